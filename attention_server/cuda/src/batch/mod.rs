//! A batch of tasks as calls of cuDNN. Pure: nothing here touches a device.

#[cfg(test)]
mod emulation;
mod layout;
mod pieces;
mod tables;

pub(crate) use layout::{
    BatchLayout, BatchTables, Call, CallTables, LaidTask, MoveTable, OperandPlace, Regions, TaskOperands,
    Tensors, call_geometry,
};
pub(crate) use pieces::{Cut, Shape};
pub(crate) use tables::{KeyHead, MadeUp, Move, RowHead, RowMove};
