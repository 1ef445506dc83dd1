//! Ready-made masks of sequences that share prefixes, packed into one document so that a prefix is computed once.

use super::{BandSlice, Mask, check_heads, check_range, check_slices, check_tokens};
use crate::{InvalidAttention, MAX_TOKENS, Span};

/// A run of tokens in a tree of prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefixSegment {
    /// Its length.
    pub tokens: usize,
    /// Index of the segment that it continues, which comes before it. `None` for one that starts a sequence.
    pub parent: Option<usize>,
}

/// Segments with their places in the document.
struct Tree {
    segments: Vec<(Span, Option<usize>)>,
}

impl Mask {
    /// Branches that share a prefix, as the rollouts of one prompt do: the document is `prefix` tokens, then a branch
    /// of each of the lengths `branches`. The prefix is causal; a token of a branch sees the whole prefix and its own
    /// branch up to itself, and no other branch.
    ///
    /// Without a prefix (zero) the branches are independent causal sequences, without branches the mask is causal. One
    /// slice for the prefix and one for each branch, one alone for a prefix and a single branch.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] for a branch without tokens, when prefix and branches together do not have
    /// `1..=`[`MAX_TOKENS`] tokens, or for more than [`MAX_MASK_SLICES`](crate::MAX_MASK_SLICES) slices;
    /// [`InvalidAttention::EmptySpan`] or [`InvalidAttention::OutsideSpan`] for no heads or heads from
    /// [`MAX_HEADS`](crate::MAX_HEADS) on.
    pub fn shared_prefix(
        prefix: usize,
        branches: &[usize],
        kv_heads: Span,
    ) -> Result<Mask, InvalidAttention> {
        check_heads(kv_heads)?;
        Ok(Mask::of(Tree::star(0, prefix, branches)?.slices()?, kv_heads))
    }

    /// A tree of prefixes: the document is the segments in the order given, and a token sees all of its segment's
    /// ancestors and its own segment up to itself. Several segments may start sequences; those never see each other.
    ///
    /// A segment's keys take one slice for each run of consecutive segments that see them, so one alone in depth-first
    /// order; neighbouring segments that the same run sees share a slice.
    ///
    /// # Errors
    /// [`InvalidAttention::OutOfRange`] for a segment without tokens, when all segments do not have
    /// `1..=`[`MAX_TOKENS`] tokens together, or for more than [`MAX_MASK_SLICES`](crate::MAX_MASK_SLICES) slices before
    /// neighbours are joined; [`InvalidAttention::OutsideSpan`] for a parent that does not come before its child, or
    /// heads from [`MAX_HEADS`](crate::MAX_HEADS) on; [`InvalidAttention::EmptySpan`] for no heads.
    pub fn prefix_tree(segments: &[PrefixSegment], kv_heads: Span) -> Result<Mask, InvalidAttention> {
        check_heads(kv_heads)?;
        Ok(Mask::of(Tree::new(0, segments.iter().copied())?.slices()?, kv_heads))
    }

    /// Branches that see of their shared prefix one anchor token alone, which has gathered what the prefix says. The
    /// document is laid out as in [`Mask::shared_prefix`]. Exactly these cells count, for a query `i`:
    ///
    /// - in the prefix, the keys `0..=i`;
    /// - in a branch that starts at `s`, the key `anchor` and the keys `s..=i`.
    ///
    /// `anchor` is a position in the prefix, usually its last, `prefix - 1`. At most two slices more than branches.
    ///
    /// # Errors
    /// As [`Mask::shared_prefix`], and [`InvalidAttention::OutOfRange`] for a prefix without tokens or an anchor outside
    /// it.
    pub fn anchor_token(
        prefix: usize,
        anchor: usize,
        branches: &[usize],
        kv_heads: Span,
    ) -> Result<Mask, InvalidAttention> {
        check_range("prefix of anchor_token", prefix, 1, MAX_TOKENS)?;
        check_range("anchor of anchor_token", anchor, 0, prefix - 1)?;
        check_heads(kv_heads)?;
        let own = |q: Span, kv: Span| BandSlice { q, kv, lo: None, hi: Some(0) };
        if anchor == prefix - 1 {
            // The last token and the branches are a shared prefix of one token; what is left are the keys before it.
            let mut slices = Tree::star(anchor, 1, branches)?.slices()?;
            if anchor > 0 {
                slices.insert(0, own(Span::to(prefix), Span::to(anchor)));
            }
            return Ok(Mask::of(slices, kv_heads));
        }
        let branches = Tree::star(prefix, 0, branches)?;
        let mut slices = vec![own(Span::to(prefix), Span::to(prefix))];
        if let Some(end) = branches.end() {
            let q = Span::at(prefix, end - prefix);
            slices.push(BandSlice { q, kv: Span::at(anchor, 1), lo: None, hi: None });
            slices.extend(branches.slices()?);
        }
        Ok(Mask::of(slices, kv_heads))
    }
}

impl Tree {
    /// The segments one after another from token `start` on.
    fn new(start: usize, segments: impl Iterator<Item = PrefixSegment>) -> Result<Tree, InvalidAttention> {
        let mut placed = Vec::new();
        let mut at = start;
        for (index, PrefixSegment { tokens, parent }) in segments.enumerate() {
            check_range("tokens of a segment", tokens, 1, MAX_TOKENS)?;
            check_slices(index + 1)?;
            let bound = Span::to(index);
            if let Some(parent) = parent
                && !bound.contains(parent)
            {
                let span = Span::at(parent, 1);
                let (field, bound_name) = ("parent of a segment", "the segments before it");
                return Err(InvalidAttention::OutsideSpan { field, span, bound_name, bound });
            }
            placed.push((Span::at(at, tokens), parent));
            at += tokens;
            check_tokens(at)?;
        }
        Ok(Tree { segments: placed })
    }

    /// A prefix, if it has tokens, and its branches.
    fn star(start: usize, prefix: usize, branches: &[usize]) -> Result<Tree, InvalidAttention> {
        let root = (prefix > 0).then_some(PrefixSegment { tokens: prefix, parent: None });
        let parent = root.map(|_| 0);
        let branches = branches.iter().map(|tokens| PrefixSegment { tokens: *tokens, parent });
        Tree::new(start, root.into_iter().chain(branches))
    }

    /// One past the last token, `None` without segments.
    fn end(&self) -> Option<usize> {
        self.segments.last().map(|(span, _)| span.end())
    }

    /// The cells, in order of first query and then of first key.
    fn slices(&self) -> Result<Vec<BandSlice>, InvalidAttention> {
        let tokens = self.end().unwrap_or(0);
        check_tokens(tokens)?;
        let parent = |segment: usize| self.segments[segment].1;
        // Where the run of rows that see a segment, as of now, began.
        let mut began = vec![0; self.segments.len()];
        let (mut slices, mut runs) = (Vec::new(), 0);
        for row in 0..=self.segments.len() {
            let at = self.segments.get(row).map_or(tokens, |(span, _)| span.start());
            let (mut before, mut now) = (row.checked_sub(1), (row < self.segments.len()).then_some(row));
            let mut unseen = Vec::new();
            // Parents come before their children, so going up from the later of the two leads to where the paths of
            // both rows meet.
            while before != now {
                if before > now {
                    unseen.extend(before);
                    before = before.and_then(parent);
                } else {
                    now.into_iter().for_each(|segment| began[segment] = at);
                    now = now.and_then(parent);
                    runs += 1;
                }
            }
            check_slices(runs)?;
            self.end_runs(&unseen, &began, at, &mut slices);
        }
        slices.sort_by_key(|s: &BandSlice| (s.q, s.kv));
        Ok(slices)
    }

    /// Makes slices of the runs of rows that end at `end` and see the segments `unseen`, last segment first.
    fn end_runs(&self, unseen: &[usize], began: &[usize], end: usize, slices: &mut Vec<BandSlice>) {
        let span = |segment: usize| self.segments[segment].0;
        let own = |segment: usize| began[segment] == span(segment).start();
        let joined = |later: &usize, earlier: &usize| {
            let alike = (own(*later) && own(*earlier)) || began[*later] == began[*earlier];
            earlier + 1 == *later && alike
        };
        for segments in unseen.chunk_by(joined) {
            let (Some(first), Some(last)) = (segments.last(), segments.first()) else { continue };
            let q = Span::at(began[*first], end - began[*first]);
            let hi = own(*first).then_some(0);
            slices.push(BandSlice { q, kv: span(*first).hull(span(*last)), lo: None, hi });
        }
    }
}
