//! Keys at home: where they lie, and how a server names what it fetches and delivers.

use outboard_attention::{DocumentId, InvalidAttention, Span};

use super::{check_name, convert, not_empty};
use crate::{TaskError, v1};

/// Most homes that a task may name. With the longest addresses its header still is a message that peers read.
pub const MAX_KEY_HOMES: usize = 8192;

/// Where the keys of some tokens lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyHome {
    /// The tokens, by their positions in the document.
    pub tokens: Span,
    /// Their home rank, for messages to people.
    pub rank: u32,
    /// Where its HomeService listens, "host:port".
    pub address: String,
}

/// One layer's attention of one tick.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerRef {
    /// The job.
    pub job: String,
    /// Training step.
    pub step: u64,
    /// Layer, from zero.
    pub layer: u32,
    /// Nano-batch.
    pub tick: u32,
}

/// Some tokens' keys of some heads, which have one home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    /// The layer.
    pub layer: LayerRef,
    /// The document.
    pub document: DocumentId,
    /// Positions in it.
    pub tokens: Span,
    /// The kv heads.
    pub kv_heads: Span,
}

/// Names a task's share of the gradients of a range of keys, or its group's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GradientHeader {
    /// Of what.
    pub range: KeyRange,
    /// Reduction group of the task.
    pub group: u32,
    /// Place within the group.
    pub position: u32,
    /// How many tasks were added up that read any of the range's keys; the position is that of the group's first then. 0
    /// for the share of one task alone.
    pub summed: u32,
}

impl std::fmt::Display for LayerRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LayerRef { job, step, layer, .. } = self;
        write!(f, "job {job}, step {step}, layer {layer}")
    }
}

impl std::fmt::Display for KeyRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let KeyRange { layer, document, tokens, kv_heads } = self;
        write!(f, "{layer}, document {document}, keys {tokens}, kv heads {kv_heads}")
    }
}

/// The homes of a task's keys: none, or a partition, in order, of tokens that cover its own.
pub(super) fn key_homes(homes: Vec<v1::KeyHome>, kv: Span) -> Result<Vec<KeyHome>, TaskError> {
    let home =
        |(n, home)| KeyHome::try_from(home).map_err(|e: TaskError| e.context(format_args!("key_homes[{n}]")));
    let homes = homes.into_iter().enumerate().map(home).collect::<Result<Vec<_>, _>>()?;
    if !homes.is_empty() {
        check_key_homes(&homes, kv)?;
    }
    Ok(homes)
}

/// Checks that homes partition, in order, tokens that cover the keys `kv` of a task.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`], naming what does not follow what.
pub fn check_key_homes(homes: &[KeyHome], kv: Span) -> Result<(), TaskError> {
    if homes.len() > MAX_KEY_HOMES {
        let count = homes.len();
        return Err(TaskError::invalid(format!(
            "key_homes holds {count} homes; at most {MAX_KEY_HOMES} are allowed"
        )));
    }
    let (Some(first), Some(last)) = (homes.first(), homes.last()) else {
        return Err(TaskError::invalid("key_homes is empty; name the homes of the task's keys"));
    };
    for (n, home) in homes.iter().enumerate() {
        home.check().map_err(|e| e.context(format_args!("key_homes[{n}]")))?;
    }
    for pair in homes.windows(2) {
        if let [before, after] = pair
            && before.tokens.end() != after.tokens.start()
        {
            let (before, after) = (before.tokens, after.tokens);
            return Err(TaskError::invalid(format!(
                "key_homes names tokens {after} after {before}; they must follow each other without a gap"
            )));
        }
    }
    let bound = first.tokens.hull(last.tokens);
    if !bound.covers(kv) {
        let (field, bound_name) = ("kv", "the tokens of key_homes");
        return Err(InvalidAttention::OutsideSpan { field, span: kv, bound_name, bound }.into());
    }
    Ok(())
}

impl KeyHome {
    fn check(&self) -> Result<(), TaskError> {
        let KeyHome { tokens, rank, address } = self;
        check_name("address", address)?;
        if address.is_empty() {
            return Err(TaskError::invalid(format!("address of rank {rank} is empty; give \"host:port\"")));
        }
        not_empty("tokens", *tokens).map(drop)
    }
}

impl TryFrom<v1::KeyHome> for KeyHome {
    type Error = TaskError;

    fn try_from(home: v1::KeyHome) -> Result<KeyHome, TaskError> {
        let v1::KeyHome { tokens, rank, address } = home;
        let home = KeyHome { tokens: convert("tokens", tokens)?, rank, address };
        home.check()?;
        Ok(home)
    }
}

impl From<&KeyHome> for v1::KeyHome {
    fn from(home: &KeyHome) -> v1::KeyHome {
        let KeyHome { tokens, rank, address } = home;
        v1::KeyHome { tokens: Some(tokens.into()), rank: *rank, address: address.clone() }
    }
}

impl TryFrom<v1::LayerRef> for LayerRef {
    type Error = TaskError;

    fn try_from(layer: v1::LayerRef) -> Result<LayerRef, TaskError> {
        let v1::LayerRef { job, step, layer, tick } = layer;
        check_name("job", &job)?;
        Ok(LayerRef { job, step, layer, tick })
    }
}

impl From<&LayerRef> for v1::LayerRef {
    fn from(layer: &LayerRef) -> v1::LayerRef {
        let LayerRef { job, step, layer, tick } = layer;
        v1::LayerRef { job: job.clone(), step: *step, layer: *layer, tick: *tick }
    }
}

impl TryFrom<v1::KeyRange> for KeyRange {
    type Error = TaskError;

    fn try_from(range: v1::KeyRange) -> Result<KeyRange, TaskError> {
        let v1::KeyRange { layer, document, tokens, kv_heads } = range;
        Ok(KeyRange {
            layer: convert("layer", layer)?,
            document: convert("document", document)?,
            tokens: not_empty("tokens", convert("tokens", tokens)?)?,
            kv_heads: not_empty("kv_heads", convert("kv_heads", kv_heads)?)?,
        })
    }
}

impl From<&KeyRange> for v1::KeyRange {
    fn from(range: &KeyRange) -> v1::KeyRange {
        let KeyRange { layer, document, tokens, kv_heads } = range;
        v1::KeyRange {
            layer: Some(layer.into()),
            document: Some(document.into()),
            tokens: Some(tokens.into()),
            kv_heads: Some(kv_heads.into()),
        }
    }
}

impl TryFrom<v1::GradientHeader> for GradientHeader {
    type Error = TaskError;

    fn try_from(header: v1::GradientHeader) -> Result<GradientHeader, TaskError> {
        let v1::GradientHeader { range, group, position, summed, .. } = header;
        Ok(GradientHeader { range: convert("range", range)?, group, position, summed })
    }
}
