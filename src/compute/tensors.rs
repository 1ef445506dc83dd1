//! Tensors in files: raw little-endian elements, contiguous `[tokens, heads, dim]`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use half::{bf16, f16};
use outboard_attention::kernel::{Operands, Results};
use outboard_attention::{AnyTensor, DType, Direction, TensorView};

use super::files::Entry;

/// A tensor as it was read.
enum Tensor {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

/// All that a task is computed from.
pub(super) struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// For backward.
    gradient: Option<Gradient>,
}

struct Gradient {
    d_o: Tensor,
    lse: Vec<f32>,
    d: Vec<f32>,
}

impl Inputs {
    /// Reads a task's tensors. Errors name the file and what it should hold.
    pub(super) fn read(dir: &Path, entry: &Entry) -> anyhow::Result<Inputs> {
        let shapes = entry.task.shapes(&entry.geometry);
        let dtype = entry.geometry.dtype();
        let tensor = |suffix, shape| Stored { dir, entry, suffix, shape, dtype }.read();
        let row = |suffix| {
            let stored = Stored { dir, entry, suffix, shape: shapes.row, dtype: DType::F32 };
            anyhow::Ok(elements(&stored.bytes()?, f32::from_le_bytes))
        };
        let gradient = match entry.direction {
            Direction::Forward => None,
            Direction::Backward => {
                Some(Gradient { d_o: tensor("d_o", shapes.o)?, lse: row("lse")?, d: row("d")? })
            }
        };
        let (q, k, v) = (tensor("q", shapes.q)?, tensor("k", shapes.k)?, tensor("v", shapes.v)?);
        Ok(Inputs { q, k, v, gradient })
    }

    /// The tensors as a kernel takes them.
    pub(super) fn operands(&self, entry: &Entry) -> anyhow::Result<Operands<'_>> {
        let shapes = entry.task.shapes(&entry.geometry);
        let q = self.q.view("q", shapes.q)?;
        let k = self.k.view("k", shapes.k)?;
        let v = self.v.view("v", shapes.v)?;
        Ok(match &self.gradient {
            None => Operands::Forward { q: q.into(), k, v },
            Some(Gradient { d_o, lse, d }) => Operands::Backward {
                q,
                k,
                v,
                d_o: d_o.view("d_o", shapes.o)?.into(),
                lse: TensorView::contiguous("lse", lse, shapes.row)?,
                d: TensorView::contiguous("d", d, shapes.row)?,
            },
        })
    }
}

/// Bytes of a task's tensors and results in memory.
pub(super) fn bytes(entry: &Entry) -> u128 {
    let shapes = entry.task.shapes(&entry.geometry);
    let elements = |shape: [usize; 3]| shape.iter().map(|&side| side as u128).product::<u128>();
    let [q, k, v, o, row] = [shapes.q, shapes.k, shapes.v, shapes.o, shapes.row].map(elements);
    let element = entry.geometry.dtype().bytes() as u128;
    match entry.direction {
        Direction::Forward => element * (q + k + v) + 4 * (o + row),
        Direction::Backward => element * (q + k + v + o) + 4 * (2 * row + q + k + v),
    }
}

/// Writes a task's results as f32, each tensor to a file of its own.
pub(super) fn write(dir: &Path, entry: &Entry, results: &Results) -> anyhow::Result<()> {
    let write = |suffix: &str, data: &[f32]| {
        let path = file(dir, entry, suffix);
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    match results {
        Results::Forward { o, lse } => {
            write("o", o)?;
            write("lse_out", lse)
        }
        Results::Backward { dq, dk, dv } => {
            write("dq", dq)?;
            write("dk", dk)?;
            write("dv", dv)
        }
        Results::Stage(_) => bail!("task {}: the device gave a part of its results", entry.name),
    }
}

fn file(dir: &Path, entry: &Entry, suffix: &str) -> PathBuf {
    dir.join(format!("{}.{suffix}", entry.name))
}

/// A tensor's file, and what it should hold.
struct Stored<'a> {
    dir: &'a Path,
    entry: &'a Entry,
    suffix: &'static str,
    shape: [usize; 3],
    dtype: DType,
}

impl Stored<'_> {
    fn read(&self) -> anyhow::Result<Tensor> {
        let bytes = self.bytes()?;
        Ok(match self.dtype {
            DType::F32 => Tensor::F32(elements(&bytes, f32::from_le_bytes)),
            DType::Bf16 => Tensor::Bf16(elements(&bytes, bf16::from_le_bytes)),
            DType::F16 => Tensor::F16(elements(&bytes, f16::from_le_bytes)),
            other => bail!("task {}: tensors of {other} cannot be read from files", self.entry.name),
        })
    }

    /// Exactly the bytes of the tensor. Sizes are compared before anything is read, so that a wrong file costs nothing.
    fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        let path = file(self.dir, self.entry, self.suffix);
        let (name, direction) = (&self.entry.name, self.entry.direction);
        let (path, suffix) = (path.display(), self.suffix);
        let missing = || format!("cannot read {path}, the {suffix} of task {name} ({direction})");
        // Opening a pipe would wait for its writer.
        let found = std::fs::metadata(file(self.dir, self.entry, suffix)).with_context(missing)?;
        ensure!(found.is_file(), "{path}, the {suffix} of task {name}, is not a file");
        let [tokens, heads, dim] = self.shape;
        let needed = (tokens * heads * dim) as u64 * self.dtype.bytes() as u64;
        let fits = |held: u64| {
            let dtype = self.dtype;
            ensure!(
                held == needed,
                "{path} holds {held} bytes; task {name} needs {needed}: {suffix} is {dtype} [{tokens} tokens, {heads} \
                 heads, {dim} elements], contiguous, of the task's own positions and heads"
            );
            Ok(())
        };
        fits(found.len())?;
        let mut bytes = Vec::with_capacity(usize::try_from(needed)?);
        let opened = File::open(file(self.dir, self.entry, suffix)).with_context(missing)?;
        opened.take(needed.saturating_add(1)).read_to_end(&mut bytes).with_context(missing)?;
        fits(bytes.len() as u64)?;
        Ok(bytes)
    }
}

impl Tensor {
    fn view(&self, name: &'static str, shape: [usize; 3]) -> anyhow::Result<AnyTensor<'_>> {
        Ok(match self {
            Tensor::F32(data) => TensorView::contiguous(name, data, shape)?.into(),
            Tensor::Bf16(data) => TensorView::contiguous(name, data, shape)?.into(),
            Tensor::F16(data) => TensorView::contiguous(name, data, shape)?.into(),
        })
    }
}

fn elements<T, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|element| from(*element)).collect()
}
