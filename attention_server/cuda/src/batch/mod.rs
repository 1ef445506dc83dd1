//! A batch of tasks as calls of cuDNN. Pure: nothing here touches a device.

mod device_tables;
#[cfg(test)]
mod emulation;
mod heads;
mod layout;
mod movement;
mod pieces;
mod places;
mod tables;

pub(crate) use device_tables::{BatchTables, CallTables, MoveTable};
pub(crate) use heads::MAX_PIECES;
pub(crate) use layout::BatchLayout;
pub(crate) use pieces::{Cut, Shape};
pub(crate) use places::{Call, LaidTask, OperandPlace, Regions, TaskOperands, Tensors, call_geometry};
