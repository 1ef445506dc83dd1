//! Ready-made masks of one document: full, windows, chunks and groups.

use super::{BandSlice, Mask, MaskPart, check_heads, check_range, check_slices, check_tokens};
use crate::{InvalidAttention, MAX_TOKENS, Span};

impl Mask {
    /// The causal mask of a document of `tokens` tokens, for `kv_heads` heads. Empty for zero of either. One slice.
    pub fn causal(tokens: usize, kv_heads: usize) -> Mask {
        let all = Span::to(tokens);
        if tokens == 0 || kv_heads == 0 {
            return Mask::default();
        }
        let slice = BandSlice { q: all, kv: all, lo: None, hi: Some(0) };
        Mask(vec![MaskPart { kv_heads: Span::to(kv_heads), slice }])
    }

    /// Every token sees every token, before and after it. One slice.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] unless `tokens` is within `1..=`[`MAX_TOKENS`],
    /// [`InvalidAttention::EmptySpan`] or [`InvalidAttention::OutsideSpan`] for no heads or heads from
    /// [`MAX_HEADS`](crate::MAX_HEADS) on.
    pub fn full(tokens: usize, kv_heads: Span) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_heads(kv_heads)?;
        let all = Span::to(tokens);
        Ok(Mask::of([BandSlice { q: all, kv: all, lo: None, hi: None }], kv_heads))
    }

    /// A causal sliding window: a token sees itself and the `window` tokens before it, so `lo = -window, hi = 0`.
    /// Where a model's window counts the token itself, `window` is one less. Zero leaves each token itself alone; a
    /// window of the whole document or more is causal. One slice.
    ///
    /// # Errors
    /// As [`Mask::full`].
    pub fn sliding_window(tokens: usize, window: usize, kv_heads: Span) -> Result<Mask, InvalidAttention> {
        Mask::sink_window(tokens, 0, window, kv_heads)
    }

    /// A sliding window that keeps the document's first tokens in sight (attention sinks, as in StreamingLLM): a token
    /// sees itself, the `window` tokens before it, and those of the first `sinks` tokens that are not after it. One
    /// slice where that is causal or there are no sinks, two otherwise.
    ///
    /// # Errors
    /// As [`Mask::full`].
    pub fn sink_window(
        tokens: usize,
        sinks: usize,
        window: usize,
        kv_heads: Span,
    ) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_heads(kv_heads)?;
        let all = Span::to(tokens);
        // The first key that is out of sight, if any, is the one after the sinks, for the query just beyond its window.
        if sinks.saturating_add(window) >= tokens - 1 {
            return Ok(Mask::of([BandSlice { q: all, kv: all, lo: None, hi: Some(0) }], kv_heads));
        }
        let near = BandSlice { q: all, kv: all, lo: Some(-(window as i64)), hi: Some(0) };
        let beyond = Span::at(window + 1, tokens - window - 1);
        let far = BandSlice { q: beyond, kv: Span::to(sinks), lo: None, hi: Some(-(window as i64) - 1) };
        Ok(Mask::of([near].into_iter().chain((sinks > 0).then_some(far)), kv_heads))
    }

    /// One chunk of a chunked prefill: the queries are the last `queries` of the `tokens` tokens so far, each of which
    /// sees all keys up to itself. The band is aligned to the bottom right, which with absolute positions is causal:
    /// queries are `[tokens - queries, tokens)`, keys `[0, tokens)`, and the keys before the chunk are those of a
    /// cache. One slice.
    ///
    /// # Errors
    /// As [`Mask::full`], and [`InvalidAttention::OutOfRange`] unless `queries` is within `1..=tokens`.
    pub fn prefill_chunk(tokens: usize, queries: usize, kv_heads: Span) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_range("queries of the prefill chunk", queries, 1, tokens)?;
        check_heads(kv_heads)?;
        let (q, kv) = (Span::at(tokens - queries, queries), Span::to(tokens));
        Ok(Mask::of([BandSlice { q, kv, lo: None, hi: Some(0) }], kv_heads))
    }

    /// Shifted sparse attention (S2-Attn of LongLoRA): the first half of the kv heads, rounded up, attends causally
    /// within groups of `group` tokens, the other half within groups shifted by `group / 2`, rounded down.
    ///
    /// Nothing wraps around the ends. Groups without shift start at multiples of `group`, and the last is shorter when
    /// `group` does not divide `tokens`. Shifted groups start at `group / 2` plus multiples of `group`; the first
    /// `group / 2` tokens are a group of their own, and the last is again as long as what is left. A single head is
    /// not shifted. One slice for each group of either half.
    ///
    /// # Errors
    /// As [`Mask::full`], and [`InvalidAttention::OutOfRange`] unless `group` is within `1..=`[`MAX_TOKENS`], or for
    /// more than [`MAX_MASK_SLICES`](crate::MAX_MASK_SLICES) groups.
    pub fn shifted_sparse(tokens: usize, group: usize, kv_heads: Span) -> Result<Mask, InvalidAttention> {
        check_tokens(tokens)?;
        check_range("group of shifted_sparse", group, 1, MAX_TOKENS)?;
        check_heads(kv_heads)?;
        let shifted = kv_heads.len() / 2;
        let straight = kv_heads.len() - shifted;
        let first = (group / 2).min(tokens);
        let halves = [
            (Span::at(kv_heads.start(), straight), 0, tokens),
            (Span::at(kv_heads.start() + straight, shifted), 0, first),
            (Span::at(kv_heads.start() + straight, shifted), first, tokens),
        ];
        let halves = halves.into_iter().filter(|(heads, _, _)| !heads.is_empty());
        check_slices(halves.clone().map(|(_, start, end)| (end - start).div_ceil(group)).sum())?;
        let mut parts = Vec::new();
        for (kv_heads, start, end) in halves {
            for at in (start..end).step_by(group) {
                let own = Span::at(at, group.min(end - at));
                parts
                    .push(MaskPart { kv_heads, slice: BandSlice { q: own, kv: own, lo: None, hi: Some(0) } });
            }
        }
        Ok(Mask(parts))
    }
}

/// Cuts the queries `q` of a mask or task into chunks of `chunk` tokens, in order, the last of which may be shorter.
///
/// So a backward pass takes a chunk of queries at a time and needs Q, dO, LSE and D of that chunk alone. Each chunk's
/// mask is [`Mask::clip`] of the whole, which [`Task::new`](crate::Task::new) does too. Chunks share no row of dQ,
/// and their dK and dV are partial gradients that [`merge::add_gradients`](crate::merge::add_gradients) sums in the
/// order of the chunks:
///
/// ```
/// use outboard_attention::{DocumentId, InvalidAttention, Mask, Span, Task, query_chunks};
///
/// let (heads, all) = (Span::to(8), Span::to(10_000));
/// let mask = Mask::sliding_window(10_000, 1023, heads)?;
/// let document = DocumentId { rank: 0, index: 0 };
/// let tasks = query_chunks(all, 4096)?
///     .map(|q| Task::new(document, q, Span::to(q.end()), heads, &mask))
///     .collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(tasks.iter().map(Task::cells).sum::<u64>(), mask.cells());
/// assert_eq!(tasks[2].q(), Span::at(8192, 1808));
/// # Ok::<(), InvalidAttention>(())
/// ```
///
/// # Errors
/// [`InvalidAttention::OutOfRange`] for a chunk of zero tokens.
pub fn query_chunks(q: Span, chunk: usize) -> Result<impl Iterator<Item = Span> + Clone, InvalidAttention> {
    check_range("chunk of query_chunks", chunk, 1, usize::MAX)?;
    Ok(q.iter().step_by(chunk).map(move |start| Span::at(start, chunk.min(q.end() - start))))
}
