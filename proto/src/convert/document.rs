//! Documents.

use outboard_attention::{BandSlice, Document, HomeRange, MAX_HEADS, MAX_TOKENS, MaskPart, Span};

use super::types::{mask, slices};
use super::{convert, index};
use crate::{TaskError, v1};

impl TryFrom<v1::HomeRange> for HomeRange {
    type Error = TaskError;

    fn try_from(home: v1::HomeRange) -> Result<HomeRange, TaskError> {
        Ok(HomeRange { rank: home.rank, tokens: convert("tokens", home.tokens)? })
    }
}

impl From<&HomeRange> for v1::HomeRange {
    fn from(home: &HomeRange) -> v1::HomeRange {
        v1::HomeRange { rank: home.rank, tokens: Some((&home.tokens).into()) }
    }
}

impl TryFrom<v1::Document> for Document {
    type Error = TaskError;

    fn try_from(document: v1::Document) -> Result<Document, TaskError> {
        let id = convert("document.id", document.id)?;
        let name = |error: TaskError| error.context(format_args!("document {id}"));
        let tokens = index("document.tokens", document.tokens).map_err(name)?;
        let home = |(n, home)| {
            HomeRange::try_from(home).map_err(|e: TaskError| e.context(format_args!("homes[{n}]")))
        };
        let homes =
            document.homes.into_iter().enumerate().map(home).collect::<Result<Vec<_>, _>>().map_err(name)?;
        let causal = match homes.is_empty() {
            true => Document::unplaced(id, tokens),
            false => Document::new(id, tokens, homes),
        };
        let causal = causal.map_err(|error| name(error.into()))?.with_tick(document.tick);
        if document.mask.is_empty() {
            return Ok(causal);
        }
        let mask = mask("mask", document.mask).map_err(name)?;
        causal.with_mask(mask).map_err(|error| name(error.into()))
    }
}

impl From<&Document> for v1::Document {
    fn from(document: &Document) -> v1::Document {
        let mut mask = Vec::new();
        if !document.is_causal() {
            mask = slices(&document.mask(MAX_HEADS));
            if mask.is_empty() {
                mask.extend(no_cell());
            }
        }
        v1::Document {
            id: Some((&document.id()).into()),
            tokens: document.tokens() as u64,
            homes: document.homes().iter().map(v1::HomeRange::from).collect(),
            tick: document.tick(),
            mask,
        }
    }
}

/// A slice that counts no cell: on the wire, a mask without slices would read as causal.
fn no_cell() -> Option<v1::BandSlice> {
    let beyond = Some(MAX_TOKENS as i64 + 1);
    let slice = BandSlice::new(Span::to(1), Span::to(1), beyond, beyond).ok()?;
    Some((&MaskPart { kv_heads: Span::to(1), slice }).into())
}
