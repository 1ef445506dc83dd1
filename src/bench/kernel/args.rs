//! Arguments of `outboard bench kernel`: which shapes, by which instruction set, and where figures go.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, ensure};
use outboard_attention::kernel::Isa;
use outboard_attention::{
    DType, Direction, DocumentId, HeadGeometry, HeadShape, MAX_TOKENS, Mask, Span, Task,
};

use crate::cuda::CudaArgs;
use crate::device::Device;

/// Arguments of `outboard bench kernel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What computes: cpu, or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub(crate) device: Device,
    /// Measure everything the kernel has a target for, and of a CPU say what passes. It takes a few minutes.
    #[arg(long, conflicts_with_all = [
        "tokens", "queries", "heads", "kv_heads", "head_dim", "v_head_dim", "softcap", "dtype", "mask", "directions",
    ])]
    pub(crate) suite: bool,
    /// With --suite: only the rows with TEXT in their name.
    #[arg(long, value_name = "TEXT", requires = "suite")]
    pub(crate) only: Option<String>,
    /// Keys of the one document.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 4096])]
    pub(crate) tokens: Vec<usize>,
    /// Only the last N of --tokens are queries, as in a shard [default: all].
    #[arg(long, value_name = "N")]
    pub(crate) queries: Option<usize>,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    pub(crate) heads: usize,
    /// Key/value heads, a divisor of --heads [default: as many as --heads].
    #[arg(long)]
    pub(crate) kv_heads: Option<usize>,
    /// Elements of a head of Q and K.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 128])]
    pub(crate) head_dim: Vec<usize>,
    /// Elements of a head of V [default: as many as --head-dim].
    #[arg(long)]
    pub(crate) v_head_dim: Option<usize>,
    /// Cap scores softly: s becomes CAP * tanh(s / CAP) [default: no cap].
    #[arg(long, value_name = "CAP", allow_negative_numbers = true)]
    pub(crate) softcap: Option<f32>,
    /// Element types of Q, K, V and dO: f32, bf16 or f16.
    #[arg(long, value_delimiter = ',', default_value = "f32")]
    pub(crate) dtype: Vec<DType>,
    /// Which cells count: causal, full, window:W for the last W keys before each query and its own, sink-window:S:W for
    /// the first S keys besides, shifted-sparse:G for groups of G tokens which half of the heads shift by a half,
    /// shared-prefix:P:B for B equal branches after P tokens that all of them see, or block-sparse:B:N for a query's own
    /// block of B tokens and every N-th one before it.
    #[arg(long, default_value = "causal")]
    pub(crate) mask: MaskKind,
    /// Directions to measure: forward or backward.
    #[arg(long, value_delimiter = ',', value_parser = direction, default_value = "forward,backward")]
    pub(crate) directions: Vec<Direction>,
    /// Threads, each with a core of its own [default: one, and one a core; with --suite two].
    #[arg(long, value_delimiter = ',')]
    pub(crate) threads: Vec<usize>,
    /// Instruction set: portable, avx2, avx512 or avx512-bf16 [default: the best of this machine].
    #[arg(long, alias = "isa", value_name = "SET")]
    pub(crate) simd: Option<Isa>,
    /// Measurements of each shape; medians are printed [default: 5, with --suite fewer of what takes long; on a GPU 7, and as many
    /// more as 0.6 seconds allow].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeats: Option<u32>,
    /// Write one JSON object a line to FILE instead of a table; `-` is stdout.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) cuda: CudaArgs,
}

/// Which cells of a document count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MaskKind {
    Causal,
    Full,
    Window(usize),
    SinkWindow { sink: usize, window: usize },
    ShiftedSparse(usize),
    SharedPrefix { prefix: usize, branches: usize },
    BlockSparse { block: usize, stride: usize },
}

pub(crate) fn direction(name: &str) -> Result<Direction, String> {
    [Direction::Forward, Direction::Backward]
        .into_iter()
        .find(|direction| direction.to_string() == name)
        .ok_or_else(|| "it must be forward or backward".into())
}

/// The instruction set asked for, or the best.
pub(crate) fn isa(simd: Option<Isa>) -> anyhow::Result<Isa> {
    let isa = simd.unwrap_or_else(Isa::detect);
    ensure!(isa.is_available(), "--simd {isa} is not available on this machine");
    Ok(isa)
}

impl FromStr for MaskKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let above_zero = |name: &str, value: &str| match value.parse() {
            Ok(value) if (1..=MAX_TOKENS).contains(&value) => Ok(value),
            _ => Err(format!("{name} {value:?} must be a number from 1 to {MAX_TOKENS}")),
        };
        let words: Vec<_> = text.split(':').collect();
        match words[..] {
            ["causal"] => Ok(MaskKind::Causal),
            ["full"] => Ok(MaskKind::Full),
            ["window", width] => Ok(MaskKind::Window(above_zero("window", width)?)),
            ["sink-window", sink, window] => Ok(MaskKind::SinkWindow {
                sink: above_zero("sink", sink)?,
                window: above_zero("window", window)?,
            }),
            ["shifted-sparse", group] => Ok(MaskKind::ShiftedSparse(above_zero("group", group)?)),
            ["shared-prefix", prefix, branches] => Ok(MaskKind::SharedPrefix {
                prefix: above_zero("prefix", prefix)?,
                branches: above_zero("branches", branches)?,
            }),
            ["block-sparse", block, stride] => Ok(MaskKind::BlockSparse {
                block: above_zero("block", block)?,
                stride: above_zero("stride", stride)?,
            }),
            _ => Err(
                "it must be causal, full, window:W, sink-window:S:W, shifted-sparse:G, shared-prefix:P:B or block-sparse:B:N"
                    .into(),
            ),
        }
    }
}

impl fmt::Display for MaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MaskKind::Causal => f.write_str("causal"),
            MaskKind::Full => f.write_str("full"),
            MaskKind::Window(width) => write!(f, "window:{width}"),
            MaskKind::SinkWindow { sink, window } => write!(f, "sink-window:{sink}:{window}"),
            MaskKind::ShiftedSparse(group) => write!(f, "shifted-sparse:{group}"),
            MaskKind::SharedPrefix { prefix, branches } => write!(f, "shared-prefix:{prefix}:{branches}"),
            MaskKind::BlockSparse { block, stride } => write!(f, "block-sparse:{block}:{stride}"),
        }
    }
}

impl MaskKind {
    /// The mask of a document of `tokens` tokens: the one place to add a kind to, besides its name.
    fn mask(self, tokens: usize, kv_heads: Span) -> anyhow::Result<Mask> {
        Ok(match self {
            MaskKind::Causal => Mask::prefill_chunk(tokens, tokens, kv_heads)?,
            MaskKind::Full => Mask::full(tokens, kv_heads)?,
            MaskKind::Window(width) => Mask::sliding_window(tokens, width, kv_heads)?,
            MaskKind::SinkWindow { sink, window } => Mask::sink_window(tokens, sink, window, kv_heads)?,
            MaskKind::ShiftedSparse(group) => Mask::shifted_sparse(tokens, group, kv_heads)?,
            MaskKind::SharedPrefix { prefix, branches } => {
                let rest = tokens.saturating_sub(prefix);
                ensure!(branches <= rest, "--mask {self}: {tokens} tokens leave {rest} for the branches");
                let lengths = (0..branches).map(|branch| share(rest, branches, branch)).collect::<Vec<_>>();
                Mask::shared_prefix(prefix, &lengths, kv_heads)?
            }
            MaskKind::BlockSparse { block, stride } => {
                let blocks = tokens.div_ceil(block);
                let (seen, most) = (blocks.saturating_mul(blocks) / stride.min(blocks), 1 << 22);
                ensure!(seen <= most, "--mask {self}: about {seen} blocks are too many; make them larger");
                let row = |q: usize| (q % stride..=q).step_by(stride).map(move |k| (q, k));
                Mask::block_sparse(
                    tokens,
                    block,
                    &(0..blocks).flat_map(row).collect::<Vec<_>>(),
                    true,
                    kv_heads,
                )?
            }
        })
    }

    /// The last `queries` queries of a document, against all of its keys.
    pub(crate) fn task(self, tokens: usize, queries: usize, kv_heads: usize) -> anyhow::Result<Task> {
        ensure!((1..=MAX_TOKENS).contains(&tokens), "--tokens {tokens} must be from 1 to {MAX_TOKENS}");
        ensure!(
            (1..=tokens).contains(&queries),
            "--queries {queries} must be from 1 to the number of tokens, {tokens}"
        );
        let (keys, kv_heads) = (Span::to(tokens), Span::to(kv_heads));
        let queries = Span::at(tokens - queries, queries);
        let mask = self.mask(tokens, kv_heads)?;
        Ok(Task::new(DocumentId { rank: 0, index: 0 }, queries, keys, kv_heads, &mask)?)
    }
}

impl Args {
    /// The heads of one of the head dims and element types asked for.
    pub(crate) fn geometry(&self, head_dim: usize, dtype: DType) -> anyhow::Result<HeadGeometry> {
        let shape = HeadShape {
            q_heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            head_dim,
            v_head_dim: self.v_head_dim.unwrap_or(head_dim),
            scale: scale(head_dim),
            dtype,
            softcap: self.softcap,
        };
        shape.try_into().context("these heads cannot be computed")
    }
}

/// The size of a part when `whole` is cut into `parts` as equal as can be.
fn share(whole: usize, parts: usize, part: usize) -> usize {
    whole / parts + usize::from(part < whole % parts)
}

/// What scores are scaled by in a common layer.
fn scale(head_dim: usize) -> f32 {
    1.0 / (head_dim.max(1) as f32).sqrt()
}

/// Heads of a common layer, of any element type.
pub(crate) fn geometry(
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: DType,
) -> anyhow::Result<HeadGeometry> {
    let standard = HeadGeometry::standard(q_heads, kv_heads, head_dim)?;
    Ok(HeadShape { dtype, ..standard.shape() }.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_named_as_they_are_printed() {
        for text in [
            "causal",
            "full",
            "window:7",
            "sink-window:4:7",
            "shifted-sparse:8",
            "shared-prefix:3:2",
            "block-sparse:4:2",
        ] {
            assert_eq!(text.parse::<MaskKind>().unwrap().to_string(), text);
        }
        for text in ["", "causal:1", "window", "window:0", "window:-1", "sink-window:4", "window:99999999999"]
        {
            assert!(text.parse::<MaskKind>().is_err(), "{text}");
        }
    }

    #[test]
    fn each_kind_of_mask_counts_its_cells() {
        type Counts = fn(usize, usize) -> bool;
        let counts: [(&str, Counts); 5] = [
            ("causal", |i, j| j <= i),
            ("full", |_, _| true),
            ("window:3", |i, j| j <= i && i - j <= 3),
            ("sink-window:2:3", |i, j| j <= i && (i - j <= 3 || j < 2)),
            ("block-sparse:2:3", |i, j| j <= i && (i / 2 - j / 2) % 3 == 0),
        ];
        for (text, counts) in counts {
            for (tokens, queries) in [(1, 1), (3, 2), (12, 12), (12, 5)] {
                let task = text.parse::<MaskKind>().unwrap().task(tokens, queries, 2).unwrap();
                let rows = tokens - queries..tokens;
                let cells = rows.flat_map(|i| (0..tokens).filter(move |j| counts(i, *j))).count();
                assert_eq!(task.cells(), 2 * cells as u64, "{text} {tokens} {queries}");
            }
        }
    }

    #[test]
    fn branches_share_what_the_prefix_leaves() {
        let kind = MaskKind::SharedPrefix { prefix: 4, branches: 3 };
        // Branches of 3, 3 and 2 tokens.
        let cells = 10 + (3 * 4 + 6) + (3 * 4 + 6) + (2 * 4 + 3);
        assert_eq!(kind.task(12, 12, 1).unwrap().cells(), cells);
        let message = kind.task(6, 6, 1).unwrap_err().to_string();
        assert!(message.contains("shared-prefix:4:3") && message.contains("leave 2"), "{message}");
    }

    #[test]
    fn queries_must_be_among_the_tokens() {
        for (tokens, queries) in [(0, 0), (4, 0), (4, 5), (usize::MAX, 1)] {
            assert!(MaskKind::Causal.task(tokens, queries, 1).is_err());
        }
    }
}
