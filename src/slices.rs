//! Masks in JSON files: lists of band slices.

use anyhow::{Context, ensure};
use outboard_attention::{BandSlice, HeadGeometry, Mask, MaskPart, Span};
use serde::Deserialize;

/// A band slice, of some kv heads or of all.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SliceEntry {
    q: [usize; 2],
    kv: [usize; 2],
    kv_heads: Option<[usize; 2]>,
    lo: Option<i64>,
    hi: Option<i64>,
}

/// Whose mask it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    /// "task" or "document".
    pub(crate) name: &'static str,
    /// What has the heads: "geometry" or "model".
    pub(crate) heads_of: &'static str,
    pub(crate) geometry: &'a HeadGeometry,
    /// The kv heads of slices that name none.
    pub(crate) kv_heads: Span,
}

/// The mask of a list of slices. Errors name the slice and the field at fault.
pub(crate) fn mask(slices: &[SliceEntry], owner: Owner<'_>) -> anyhow::Result<Mask> {
    ensure!(!slices.is_empty(), "mask is empty; leave it out for a causal {}", owner.name);
    let part = |(n, entry): (usize, &SliceEntry)| part(entry, owner).with_context(|| format!("mask[{n}]"));
    let parts = slices.iter().enumerate().map(part).collect::<anyhow::Result<_>>()?;
    Mask::new(parts).context("mask")
}

fn part(entry: &SliceEntry, owner: Owner<'_>) -> anyhow::Result<MaskPart> {
    let all = owner.geometry.kv_heads();
    let kv_heads = entry.kv_heads.map_or(Ok(owner.kv_heads), |ends| span("kv_heads", ends))?;
    ensure!(Span::to(all).covers(kv_heads), "kv_heads is {kv_heads}; {}.kv_heads is {all}", owner.heads_of);
    let slice = BandSlice::new(span("q", entry.q)?, span("kv", entry.kv)?, entry.lo, entry.hi)?;
    Ok(MaskPart { kv_heads, slice })
}

/// A range as files have it.
pub(crate) fn span(name: &str, [start, end]: [usize; 2]) -> anyhow::Result<Span> {
    Span::new(start, end).with_context(|| format!("{name} is [{start}, {end}], which runs backwards"))
}
