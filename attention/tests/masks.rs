//! Ready-made masks against what they say they mean, cell by cell, and the check that a mask counts no cell twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;

use common::{DOCUMENT, Random};
use outboard_attention::{
    BandSlice, InvalidAttention, MAX_HEADS, MAX_MASK_SLICES, MAX_TOKENS, Mask, MaskPart, PrefixSegment, Span,
    Task, query_chunks,
};

const ROUNDS: usize = 300;
/// Values at which arithmetic without checks goes wrong.
const EDGES: [usize; 9] =
    [0, 1, 2, MAX_TOKENS - 1, MAX_TOKENS, MAX_TOKENS + 1, usize::MAX / 2, usize::MAX - 1, usize::MAX];

fn times(slice: &BandSlice, i: usize, j: usize) -> usize {
    let offset = j as i64 - i as i64;
    let above = slice.lo().is_none_or(|lo| lo <= offset);
    let below = slice.hi().is_none_or(|hi| offset <= hi);
    usize::from(slice.q().contains(i) && slice.kv().contains(j) && above && below)
}

/// Checks that a mask of a document counts each cell that is visible once, and no other.
fn check(mask: &Mask, tokens: usize, kv_heads: Span, visible: impl Fn(usize, usize, usize) -> bool) {
    let mut cells = 0;
    for head in 0..kv_heads.end() + 2 {
        let slices: Vec<_> = mask.slices_of(head).collect();
        for (i, j) in (0..tokens + 2).flat_map(|i| (0..tokens + 2).map(move |j| (i, j))) {
            let counted: usize = slices.iter().map(|slice| times(slice, i, j)).sum();
            let within = kv_heads.contains(head) && i < tokens && j < tokens;
            let expected = usize::from(within && visible(head, i, j));
            assert_eq!(counted, expected, "head {head}, query {i}, key {j} of {mask:?}");
            cells += expected as u64;
        }
    }
    assert_eq!(mask.cells(), cells);
    assert!(mask.parts().iter().all(|part| part.slice.cells() > 0), "{mask:?} has an empty slice");
    assert_eq!(Mask::new(mask.parts().to_vec()).as_ref(), Ok(mask));
}

fn heads(random: &mut Random) -> Span {
    Span::at(random.below(3), random.within(1..=3))
}

/// A random set, given in no order and with repetitions.
fn set(random: &mut Random, below: usize, most: usize) -> Vec<usize> {
    (0..random.within(0..=most)).map(|_| random.below(below)).collect()
}

#[test]
fn windows_see_what_they_say() {
    let mut random = Random(51);
    for _ in 0..ROUNDS {
        let (tokens, kv_heads) = (random.within(1..=20), heads(&mut random));
        let (sinks, window) = (random.below(24), random.below(24));
        check(&Mask::full(tokens, kv_heads).unwrap(), tokens, kv_heads, |_, _, _| true);
        check(&Mask::causal(tokens, 2), tokens, Span::to(2), |_, i, j| j <= i);
        let near = Mask::sliding_window(tokens, window, kv_heads).unwrap();
        check(&near, tokens, kv_heads, |_, i, j| j <= i && i - j <= window);
        let sink = Mask::sink_window(tokens, sinks, window, kv_heads).unwrap();
        check(&sink, tokens, kv_heads, |_, i, j| j <= i && (j < sinks || i - j <= window));
        let queries = random.within(1..=tokens);
        let chunk = Mask::prefill_chunk(tokens, queries, kv_heads).unwrap();
        check(&chunk, tokens, kv_heads, |_, i, j| i >= tokens - queries && j <= i);
    }
}

#[test]
fn shifted_groups_do_not_wrap() {
    let mut random = Random(52);
    for _ in 0..ROUNDS {
        let (tokens, kv_heads) = (random.within(1..=24), heads(&mut random));
        let group = random.within(1..=tokens + 4);
        let mask = Mask::shifted_sparse(tokens, group, kv_heads).unwrap();
        let middle = kv_heads.start() + kv_heads.len().div_ceil(2);
        check(&mask, tokens, kv_heads, |head, i, j| {
            // A shift to the left by half a group, in front of which a group stands that is never full.
            let shift = if head < middle { 0 } else { group - group / 2 };
            j <= i && (i + shift) / group == (j + shift) / group
        });
    }
}

#[test]
fn branches_see_their_prefix_and_themselves() {
    let mut random = Random(53);
    for _ in 0..ROUNDS {
        let (prefix, kv_heads) = (random.below(9), heads(&mut random));
        let at_least = usize::from(prefix == 0);
        let branches: Vec<usize> = (0..random.within(at_least..=4)).map(|_| random.within(1..=5)).collect();
        let owner: Vec<usize> =
            branches.iter().enumerate().flat_map(|(n, len)| std::iter::repeat_n(n, *len)).collect();
        let branch = |at: usize| at.checked_sub(prefix).map(|at| owner[at]);
        let tokens = prefix + owner.len();

        let shared = Mask::shared_prefix(prefix, &branches, kv_heads).unwrap();
        let sees = |i: usize, j: usize| j <= i && (branch(j).is_none() || branch(i) == branch(j));
        check(&shared, tokens, kv_heads, |_, i, j| sees(i, j));
        let whole = if prefix > 0 && branches.len() != 1 { 1 } else { 0 };
        assert_eq!(shared.parts().len(), branches.len() + whole, "{prefix} {branches:?}");

        if prefix > 0 {
            let anchor = if random.below(2) == 0 { prefix - 1 } else { random.below(prefix) };
            let mask = Mask::anchor_token(prefix, anchor, &branches, kv_heads).unwrap();
            check(&mask, tokens, kv_heads, |_, i, j| match (branch(i), branch(j)) {
                (Some(_), None) => j == anchor,
                (a, b) => j <= i && a == b,
            });
            assert!(mask.parts().len() <= branches.len() + 2);
        }
    }
}

#[test]
fn tokens_see_their_ancestors() {
    let mut random = Random(54);
    for _ in 0..ROUNDS {
        let (count, kv_heads) = (random.within(1..=9), heads(&mut random));
        let deep = random.below(2) == 0;
        let segments: Vec<PrefixSegment> = (0..count)
            .map(|index| {
                let parent = match random.below(6) {
                    0 => None,
                    n if deep && n < 5 => index.checked_sub(1),
                    _ => (index > 0).then(|| random.below(index)),
                };
                PrefixSegment { tokens: random.within(1..=4), parent }
            })
            .collect();
        let owner: Vec<usize> =
            segments.iter().enumerate().flat_map(|(n, s)| std::iter::repeat_n(n, s.tokens)).collect();
        let mask = Mask::prefix_tree(&segments, kv_heads).unwrap();
        check(&mask, owner.len(), kv_heads, |_, i, j| {
            let mut path = std::iter::successors(Some(owner[i]), |at| segments[*at].parent);
            j <= i && path.any(|segment| segment == owner[j])
        });
    }
}

#[test]
fn trees_take_few_slices() {
    let tree = |segments: &[(usize, Option<usize>)]| {
        let segments: Vec<_> = segments
            .iter()
            .map(|(tokens, parent)| PrefixSegment { tokens: *tokens, parent: *parent })
            .collect();
        Mask::prefix_tree(&segments, Span::to(1)).unwrap().parts().len()
    };
    assert_eq!(tree(&[(5, None), (3, Some(0)), (4, Some(1)), (1, Some(2))]), 1, "a chain is causal");
    assert_eq!(tree(&[(5, None), (3, None), (4, None)]), 3, "packed documents");
    // A prompt with two continuations of two rollouts each, depth first, then breadth first.
    let depth =
        [(5, None), (3, Some(0)), (2, Some(1)), (2, Some(1)), (3, Some(0)), (2, Some(4)), (2, Some(4))];
    assert_eq!(tree(&depth), 7);
    let breadth =
        [(5, None), (3, Some(0)), (3, Some(0)), (2, Some(1)), (2, Some(1)), (2, Some(2)), (2, Some(2))];
    assert_eq!(tree(&breadth), 9);
    // A chain seen again past a stranger: its three segments share the slice.
    let again = [(2, None), (2, Some(0)), (2, Some(1)), (1, None), (2, Some(2))];
    assert_eq!(tree(&again), 4);
}

#[test]
fn blocks_see_blocks() {
    let mut random = Random(55);
    for _ in 0..ROUNDS {
        let (tokens, kv_heads) = (random.within(1..=24), heads(&mut random));
        let (block, causal) = (random.within(1..=tokens + 2), random.below(2) == 0);
        let count = tokens.div_ceil(block);
        let most = random.pick(&[count, count * count, 3 * count * count]);
        let list: Vec<_> =
            (0..random.within(0..=most)).map(|_| (random.below(count), random.below(count))).collect();
        let mask = Mask::block_sparse(tokens, block, &list, causal, kv_heads).unwrap();
        check(&mask, tokens, kv_heads, |_, i, j| {
            list.contains(&(i / block, j / block)) && (j <= i || !causal)
        });
        let runs =
            |(q, kv): &&(usize, usize)| (!causal || kv <= q) && (*kv == 0 || !list.contains(&(*q, kv - 1)));
        assert!(mask.parts().len() <= list.iter().filter(runs).count());
    }
}

#[test]
fn runs_of_blocks_share_slices() {
    let parts = |list: &[(usize, usize)], causal| {
        Mask::block_sparse(100, 10, list, causal, Span::to(1)).unwrap().parts().len()
    };
    let all: Vec<_> = (0..10).flat_map(|q| (0..10).map(move |kv| (q, kv))).collect();
    assert_eq!((parts(&all, false), parts(&all, true)), (1, 1));
    assert_eq!((parts(&[(3, 0), (3, 1), (3, 3)], true), parts(&[(3, 2), (3, 3), (3, 4)], true)), (2, 1));
    assert_eq!(parts(&[(3, 1), (3, 2), (4, 1), (4, 2), (6, 1), (6, 2)], true), 2);
    assert_eq!(parts(&[(1, 5)], true), 0);
    let local: Vec<_> = (0..10).map(|q| (q, q)).collect();
    assert_eq!((parts(&local, false), parts(&local, true)), (10, 10));
}

#[test]
fn columns_and_slashes_count_once() {
    let mut random = Random(56);
    for _ in 0..ROUNDS {
        let (tokens, kv_heads) = (random.within(1..=24), heads(&mut random));
        let columns = set(&mut random, tokens, 8);
        let slashes: Vec<_> = (0..random.below(5))
            .map(|_| {
                let start = random.below(tokens);
                Span::at(start, random.within(1..=(tokens - start).min(4)))
            })
            .collect();
        let mask = Mask::vertical_slash(tokens, &columns, &slashes, kv_heads).unwrap();
        check(&mask, tokens, kv_heads, |_, i, j| {
            j <= i && (columns.contains(&j) || slashes.iter().any(|s| s.contains(i - j)))
        });
    }
    let parts = |columns: &[usize], slashes: &[Span]| {
        Mask::vertical_slash(1000, columns, slashes, Span::to(1)).unwrap().parts().len()
    };
    assert_eq!(parts(&[], &[Span::at(20, 5), Span::at(0, 10), Span::at(10, 12)]), 1);
    assert_eq!(parts(&[5, 3, 4, 9], &[]), 2);
    assert_eq!(parts(&[5], &[Span::at(100, 5)]), 3);
    assert_eq!(parts(&[5, 500], &[Span::to(64)]), 3);
    assert_eq!(parts(&[990], &[Span::to(64)]), 1);
}

#[test]
fn chunks_of_queries_keep_every_cell() {
    let mut random = Random(57);
    for _ in 0..ROUNDS {
        let tokens = random.within(1..=60);
        let (q, chunk) = (random.span(Span::to(tokens)), random.within(1..=tokens + 3));
        let mask = Mask::sink_window(tokens, 2, tokens / 3, Span::to(2)).unwrap();
        let chunks: Vec<Span> = query_chunks(q, chunk).unwrap().collect();
        assert_eq!(chunks.iter().flat_map(|c| c.iter()).collect::<Vec<_>>(), q.iter().collect::<Vec<_>>());
        assert!(chunks[..chunks.len() - 1].iter().all(|c| c.len() == chunk));
        let task = |q| Task::new(DOCUMENT, q, Span::to(tokens), Span::to(2), &mask).unwrap();
        assert_eq!(chunks.iter().map(|c| task(*c).cells()).sum::<u64>(), task(q).cells());
    }
    assert!(query_chunks(Span::to(5), 0).is_err());
    assert_eq!(query_chunks(Span::default(), 3).unwrap().count(), 0);
    let huge = Span::to(usize::MAX);
    assert_eq!(query_chunks(huge, usize::MAX).unwrap().collect::<Vec<_>>(), [huge]);
}

#[test]
fn any_values_give_a_mask_or_an_error() {
    let mut made = 0;
    let mut check = |tokens: Option<usize>, mask: Result<Mask, InvalidAttention>| match mask {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(mask) => {
            assert!(tokens.is_none_or(|tokens| (1..=MAX_TOKENS).contains(&tokens)));
            assert!(mask.parts().len() <= 2 * MAX_MASK_SLICES);
            let sides = |p: &MaskPart| p.slice.q().end().max(p.slice.kv().end()) <= MAX_TOKENS;
            assert!(mask.parts().iter().all(sides));
            assert_eq!(Mask::new(mask.parts().to_vec()), Ok(mask));
            made += 1;
        }
    };
    let two = Span::to(2);
    for a in EDGES {
        check(Some(a), Mask::full(a, two));
        for b in EDGES {
            check(Some(a), Mask::sliding_window(a, b, two));
            check(Some(a), Mask::prefill_chunk(a, b, two));
            check(Some(a), Mask::shifted_sparse(a, b, two));
            check(None, Mask::shared_prefix(a, &[b], two));
            check(None, Mask::full(5, Span::at(a, b)));
            check(None, Mask::vertical_slash(7, &[a], &[Span::at(b, 1)], two));
            let chain = [1, 1, 2].map(|tokens| PrefixSegment { tokens, parent: None });
            check(None, Mask::prefix_tree(&[chain[0], PrefixSegment { tokens: a, parent: Some(b) }], two));
            for c in EDGES {
                check(Some(a), Mask::sink_window(a, b, c, two));
                check(None, Mask::shared_prefix(a, &[b, c], two));
                check(None, Mask::anchor_token(a, b, &[c, 1], two));
                check(None, Mask::block_sparse(a, b, &[(c, 0), (0, c), (c, c)], c % 2 == 0, two));
                check(None, Mask::vertical_slash(a, &[b, 0], &[Span::at(c, a.min(3)), Span::to(b)], two));
            }
        }
    }
    assert!(made > 300, "{made} masks");
}

#[test]
fn errors_name_the_field() {
    let text = |mask: Result<Mask, InvalidAttention>| mask.unwrap_err().to_string();
    let two = Span::to(2);
    assert!(text(Mask::full(0, two)).starts_with("mask.tokens is 0"));
    assert_eq!(text(Mask::full(1, Span::default())), "mask.kv_heads [0, 0) is empty");
    assert!(
        text(Mask::full(1, Span::at(MAX_HEADS, 1))).starts_with("mask.kv_heads [4096, 4097) reaches outside")
    );
    assert!(text(Mask::prefill_chunk(5, 6, two)).starts_with("queries of the prefill chunk is 6"));
    assert!(text(Mask::shifted_sparse(5, 0, two)).starts_with("group of shifted_sparse is 0"));
    assert!(
        text(Mask::shifted_sparse(MAX_TOKENS, 1, two)).starts_with("number of mask slices is 2147483648")
    );
    assert!(text(Mask::shared_prefix(4, &[1, 0], two)).starts_with("tokens of a segment is 0"));
    assert!(text(Mask::shared_prefix(0, &[], two)).starts_with("mask.tokens is 0"));
    assert!(text(Mask::shared_prefix(MAX_TOKENS, &[1], two)).starts_with("mask.tokens is 1073741825"));
    assert!(text(Mask::anchor_token(4, 4, &[1], two)).starts_with("anchor of anchor_token is 4"));
    let own = PrefixSegment { tokens: 2, parent: Some(0) };
    assert_eq!(
        text(Mask::prefix_tree(&[own], two)),
        "parent of a segment [0, 1) reaches outside the segments before it [0, 0)"
    );
    assert!(
        text(Mask::block_sparse(10, 4, &[(0, 3)], false, two)).starts_with("key block of block_sparse is 3")
    );
    assert!(text(Mask::vertical_slash(10, &[10], &[], two)).starts_with("column of vertical_slash is 10"));
    assert!(text(Mask::vertical_slash(10, &[], &[Span::at(3, 0)], two)).ends_with("[3, 3) is empty"));
    assert!(text(Mask::vertical_slash(10, &[], &[Span::at(3, 8)], two)).contains("[3, 11) reaches outside"));
}

#[test]
fn a_tree_of_too_many_slices_is_refused() {
    // Two chains, turn by turn: each segment breaks the runs of all of the other chain.
    let chain = |index: usize| PrefixSegment { tokens: 1, parent: index.checked_sub(2) };
    let segments: Vec<_> = (0..4000).map(chain).collect();
    assert!(Mask::prefix_tree(&segments[..1000], Span::to(1)).unwrap().parts().len() > 200_000);
    let error = Mask::prefix_tree(&segments, Span::to(1)).unwrap_err().to_string();
    assert!(error.starts_with("number of mask slices is"), "{error}");
}

/// What [`Mask::new`] should say, cell by cell.
fn first_fault(parts: &[MaskPart]) -> Option<InvalidAttention> {
    let mut owners = HashMap::new();
    for (second, part) in parts.iter().enumerate() {
        if part.kv_heads.is_empty() {
            return Some(InvalidAttention::EmptySpan { field: "mask.kv_heads", span: part.kv_heads });
        }
        let mut met = Vec::new();
        for i in part.slice.q().iter() {
            for j in part.slice.kv().iter().filter(|j| times(&part.slice, i, *j) > 0) {
                met.extend(part.kv_heads.iter().filter_map(|head| owners.insert((head, i, j), second)));
            }
        }
        if let Some(first) = met.into_iter().min() {
            return Some(InvalidAttention::Overlap { first, second });
        }
    }
    None
}

fn random_part(random: &mut Random, tokens: usize) -> MaskPart {
    let all = Span::to(tokens);
    let (q, kv) = (random.span(all), random.span(all));
    let lo = random.below(2 * tokens) as i64 - tokens as i64;
    let hi = lo + random.below(tokens) as i64;
    let (lo, hi) = (Some(lo).filter(|_| random.below(3) > 0), Some(hi).filter(|_| random.below(3) > 0));
    MaskPart { kv_heads: random.span(Span::to(4)), slice: BandSlice::new(q, kv, lo, hi).unwrap() }
}

#[test]
fn the_first_overlap_is_named() {
    let mut random = Random(58);
    let (mut sound, mut faults) = (0, 0);
    for _ in 0..ROUNDS {
        let tokens = random.within(2..=30);
        // A mask cut into many pieces, in any order, with a few strangers among them.
        let seed: Vec<_> = (0..random.within(1..=3)).map(|_| random_part(&mut random, tokens)).collect();
        let mask = Mask::new(seed.clone()).or_else(|_| Mask::new(seed[..1].to_vec())).unwrap();
        let (rows, keys) = (random.within(1..=tokens), random.within(1..=tokens));
        let mut parts = Vec::new();
        for q in query_chunks(Span::to(tokens), rows.min(4)).unwrap() {
            for kv in query_chunks(Span::to(tokens), keys.min(4)).unwrap() {
                for heads in [Span::to(1), Span::at(1, 3)] {
                    parts.extend_from_slice(mask.clip(q, kv, heads).parts());
                }
            }
        }
        for n in (1..parts.len()).rev() {
            parts.swap(n, random.below(n + 1));
        }
        for _ in 0..random.below(3) {
            let mut part = random_part(&mut random, tokens);
            if random.below(8) == 0 {
                part.kv_heads = Span::at(1, 0);
            }
            parts.insert(random.below(parts.len() + 1), part);
        }
        let fault = first_fault(&parts);
        *if fault.is_some() { &mut faults } else { &mut sound } += 1;
        assert_eq!(Mask::new(parts).err(), fault);
    }
    assert!(sound > 50 && faults > 50, "{sound} sound, {faults} faults");
}

#[test]
fn many_slices_are_checked() {
    let count = 10_000;
    let all = Span::to(count);
    let part = |kv_heads, q, kv, lo, hi| MaskPart { kv_heads, slice: BandSlice::new(q, kv, lo, hi).unwrap() };
    let one = Span::to(1);
    let columns: Vec<_> = (0..count).map(|n| part(one, all, Span::at(n, 1), None, None)).collect();
    let rows: Vec<_> = (0..count).map(|n| part(one, Span::at(n, 1), all, None, None)).collect();
    let bands: Vec<_> = (0..count as i64).map(|n| part(one, all, all, Some(-n), Some(-n))).collect();
    let nested: Vec<_> = (0..count)
        .map(|n| part(Span::new(n, 2 * count - n).unwrap(), all, Span::at(n, 1), None, None))
        .collect();
    for mut parts in [columns, rows, bands, nested] {
        assert!(Mask::new(parts.clone()).is_ok());
        parts.push(part(Span::to(2 * count), Span::at(count - 1, 1), Span::at(count / 2, 1), None, None));
        let error = Mask::new(parts).unwrap_err();
        assert!(matches!(error, InvalidAttention::Overlap { second: 10_000, .. }), "{error}");
    }
    let blocks: Vec<_> = (0..200).flat_map(|q| (0..=q / 2).map(move |kv| (q, 2 * kv + q % 2))).collect();
    let mask = Mask::block_sparse(200 * 64, 64, &blocks, true, Span::to(8)).unwrap();
    assert_eq!(mask.parts().len(), 10_100);
    assert_eq!(Mask::new(mask.parts().to_vec()), Ok(mask));
}

#[test]
fn huge_spans_are_counted_and_compared_exactly() {
    let all = Span::to(usize::MAX);
    let full = BandSlice::new(all, all, None, None).unwrap();
    assert_eq!(full.cells(), u64::MAX);
    let diagonal = BandSlice::new(all, all, Some(0), Some(0)).unwrap();
    assert_eq!((diagonal.cells(), diagonal.keys_of(usize::MAX - 1).len()), (u64::MAX, 1));
    let below = BandSlice::new(all, all, None, Some(i64::MIN)).unwrap();
    let above = BandSlice::new(all, all, Some(i64::MAX), None).unwrap();
    assert_eq!((below.cells(), above.cells()), (u64::MAX, u64::MAX));
    assert!(!below.overlaps(&above) && !below.overlaps(&diagonal) && full.overlaps(&above));
    let part = |slice| MaskPart { kv_heads: all, slice };
    let mask = Mask::new([below, above, diagonal].map(part).to_vec()).unwrap();
    assert_eq!((mask.cells(), mask.cells_of_row(0)), (u64::MAX, u64::MAX));
    assert!(Mask::new([below, above, full].map(part).to_vec()).is_err());
}
