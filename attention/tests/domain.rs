//! Masks, documents, geometry and plans against what they say they mean, cell by cell.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use outboard_attention::{
    AnyTensor, BandSlice, DType, Direction, Document, DocumentId, Elements, HeadGeometry, HeadShape,
    HomeRange, InvalidAttention, InvalidPlan, Mask, MaskPart, PlannedTask, Span, StepPlan, Task,
    TensorLayout, TensorSlice, TensorView, TickPlan,
};
use proptest::prelude::*;

const ID: DocumentId = DocumentId { rank: 3, index: 1 };

fn span(below: usize) -> impl Strategy<Value = Span> {
    (0..below, 1..=below / 2).prop_map(|(start, len)| Span::at(start, len))
}

fn end() -> impl Strategy<Value = Option<i64>> {
    prop_oneof![
        1 => Just(None),
        6 => (-40i64..40).prop_map(Some),
        1 => prop::sample::select(vec![i64::MIN, i64::MIN + 1, -(1 << 31), 1 << 31, i64::MAX]).prop_map(Some),
    ]
}

fn slice() -> impl Strategy<Value = BandSlice> {
    (span(24), span(24), end(), end())
        .prop_filter_map("band", |(q, kv, lo, hi)| BandSlice::new(q, kv, lo, hi).ok())
}

fn counts(slice: &BandSlice, i: usize, j: usize) -> bool {
    let offset = j as i64 - i as i64;
    let above = slice.lo().is_none_or(|lo| lo <= offset);
    let below = slice.hi().is_none_or(|hi| offset <= hi);
    slice.q().contains(i) && slice.kv().contains(j) && above && below
}

fn cells() -> impl Iterator<Item = (usize, usize)> {
    (0..40).flat_map(|i| (0..40).map(move |j| (i, j)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn a_slice_counts_its_cells(slice in slice()) {
        prop_assert_eq!(slice.cells(), cells().filter(|(i, j)| counts(&slice, *i, *j)).count() as u64);
        for i in 0..40 {
            let keys: Vec<usize> = (0..40).filter(|j| counts(&slice, i, *j)).collect();
            prop_assert_eq!(slice.keys_of(i).iter().collect::<Vec<_>>(), keys);
        }
    }

    #[test]
    fn clipping_keeps_the_cells_inside(slice in slice(), q in span(30), kv in span(30)) {
        let inside = |i: usize, j: usize| counts(&slice, i, j) && q.contains(i) && kv.contains(j);
        match slice.clip(q, kv) {
            None => prop_assert!(cells().all(|(i, j)| !inside(i, j))),
            Some(part) => prop_assert!(cells().all(|(i, j)| counts(&part, i, j) == inside(i, j))),
        }
    }

    #[test]
    fn slices_overlap_where_a_cell_is_common(a in slice(), b in slice()) {
        let common = cells().any(|(i, j)| counts(&a, i, j) && counts(&b, i, j));
        prop_assert_eq!(a.overlaps(&b), common);
        prop_assert_eq!(b.overlaps(&a), common);
        let parts = [a, b].map(|slice| MaskPart { kv_heads: Span::to(2), slice });
        prop_assert_eq!(Mask::new(parts.to_vec()).is_err(), common);
        let apart = vec![parts[0], MaskPart { kv_heads: Span::at(2, 1), slice: b }];
        prop_assert!(Mask::new(apart).is_ok(), "other heads never overlap");
    }

    #[test]
    fn a_mask_cut_anywhere_keeps_its_cells(a in slice(), b in slice(), row in 0usize..40, key in 0usize..40) {
        let parts = [(0, 2, a), (1, 3, b)].map(|(start, len, slice)| MaskPart { kv_heads: Span::at(start, len), slice });
        let Ok(mask) = Mask::new(parts.to_vec()) else { return Ok(()) };
        let halves = |at| [Span::to(at), Span::at(at, 100)];
        let mut total = 0;
        for q in halves(row) {
            for kv in halves(key) {
                for heads in halves(2) {
                    total += mask.clip(q, kv, heads).cells();
                }
            }
        }
        prop_assert_eq!(total, mask.cells());
        prop_assert_eq!((0..40).map(|i| mask.cells_of_row(i)).sum::<u64>(), mask.cells());
        prop_assert_eq!(mask.slices_of(1).count(), 2);
    }

    #[test]
    fn a_plan_of_random_cuts_is_valid(tokens in 1usize..60, cuts in prop::collection::vec(0usize..60, 0..4), split in 0usize..=3) {
        let geometry = HeadGeometry::standard(6, 3, 8).unwrap();
        let document = document(tokens);
        let mut at: Vec<usize> = cuts.into_iter().map(|c| c % tokens).chain([0, tokens]).collect();
        at.sort_unstable();
        at.dedup();
        let mut tasks = Vec::new();
        for rows in at.windows(2) {
            for (start, end) in [(0, split), (split, 3)] {
                if start < end {
                    let (q, kv) = (Span::new(rows[0], rows[1]).unwrap(), Span::to(rows[1]));
                    let kv_heads = Span::new(start, end).unwrap();
                    let position = tasks.len() as u32;
                    tasks.push(PlannedTask { document: ID, q, kv, kv_heads, slot: 0, group: 0, position });
                }
            }
        }
        let mut plan = StepPlan { ticks: vec![TickPlan { tick: 0, tasks }], slots: 1 };
        prop_assert_eq!(plan.check(std::slice::from_ref(&document), &geometry), Ok(()));
        let dropped = plan.ticks[0].tasks.pop().unwrap();
        let uncovered = matches!(plan.check(std::slice::from_ref(&document), &geometry), Err(InvalidPlan::Uncovered { .. }));
        prop_assert!(uncovered);
        plan.ticks[0].tasks.extend([dropped, dropped]);
        let overlaps = matches!(plan.check(&[document], &geometry), Err(InvalidPlan::Overlap { .. }));
        prop_assert!(overlaps);
    }
}

fn document(tokens: usize) -> Document {
    Document::new(ID, tokens, vec![HomeRange { rank: 3, tokens: Span::to(tokens) }]).unwrap()
}

#[test]
fn a_plan_must_be_of_this_step() {
    let geometry = HeadGeometry::standard(2, 2, 8).unwrap();
    let all = Span::to(9);
    let task =
        PlannedTask { document: ID, q: all, kv: all, kv_heads: Span::to(2), slot: 0, group: 0, position: 0 };
    let check = |task: PlannedTask, tick| {
        let plan = StepPlan { ticks: vec![TickPlan { tick, tasks: vec![task] }], slots: 1 };
        plan.check(&[document(9)], &geometry)
    };
    assert_eq!(check(task, 0), Ok(()));
    assert_eq!(check(task, 1), Err(InvalidPlan::UnknownDocument { tick: 1, document: ID }));
    let slot = InvalidPlan::UnknownSlot { document: ID, slot: 1, slots: 1 };
    assert_eq!(check(PlannedTask { slot: 1, ..task }, 0), Err(slot));
    let other = DocumentId { rank: 0, index: 0 };
    assert_eq!(
        check(PlannedTask { document: other, ..task }, 0),
        Err(InvalidPlan::UnknownDocument { tick: 0, document: other })
    );
    let error = check(PlannedTask { kv: Span::default(), ..task }, 0).unwrap_err();
    assert_eq!(error.to_string(), "document 3.1: task.kv [0, 0) is empty");
}

#[test]
fn homes_partition_a_document() {
    let home = |rank, start, len| HomeRange { rank, tokens: Span::at(start, len) };
    assert!(Document::new(ID, 10, vec![home(0, 0, 4), home(1, 4, 6)]).unwrap().sole_home().is_none());
    assert_eq!(Document::new(ID, 10, vec![home(2, 0, 4), home(2, 4, 6)]).unwrap().sole_home(), Some(2));
    for homes in [vec![], vec![home(0, 0, 9)], vec![home(0, 1, 9)], vec![home(0, 0, 6), home(1, 5, 5)]] {
        let error = Document::new(ID, 10, homes).unwrap_err();
        assert!(
            error.to_string().starts_with("document 3.1: home ranges do not add up to [0, 10)"),
            "{error}"
        );
    }
    assert!(matches!(Document::new(ID, 0, vec![]), Err(InvalidAttention::OutOfRange { .. })));
}

#[test]
fn a_document_is_causal_unless_told_otherwise() {
    let document = document(10).with_tick(2);
    assert!(document.is_causal());
    assert_eq!((document.tick(), document.mask(3).cells()), (2, 3 * 55));
    let full = |tokens| {
        let slice = BandSlice::new(Span::to(tokens), Span::to(tokens), None, None).unwrap();
        Mask::new(vec![MaskPart { kv_heads: Span::to(8), slice }]).unwrap()
    };
    let own = document.clone().with_mask(full(10)).unwrap();
    assert_eq!((own.is_causal(), own.mask(3).cells()), (false, 300));
    let error = document.with_mask(full(11)).unwrap_err();
    assert_eq!(error.to_string(), "mask.q [0, 11) reaches outside document [0, 10)");
}

#[test]
fn geometry_is_checked() {
    let shape = HeadShape {
        q_heads: 8,
        kv_heads: 2,
        head_dim: 64,
        v_head_dim: 32,
        scale: 0.125,
        dtype: DType::F32,
        softcap: None,
    };
    let geometry = HeadGeometry::try_from(shape).unwrap();
    assert_eq!((geometry.group(), geometry.q_heads_of(Span::at(1, 1))), (4, Span::at(4, 4)));
    let field = |shape: HeadShape| HeadGeometry::try_from(shape).unwrap_err().to_string();
    assert!(field(HeadShape { kv_heads: 0, ..shape }).starts_with("kv_heads is 0"));
    assert!(field(HeadShape { head_dim: 257, ..shape }).starts_with("head_dim is 257"));
    assert!(field(HeadShape { v_head_dim: 0, ..shape }).starts_with("v_head_dim is 0"));
    assert!(field(HeadShape { kv_heads: 3, ..shape }).starts_with("q_heads is 8, which kv_heads 3"));
    assert!(field(HeadShape { scale: f32::NAN, ..shape }).starts_with("scale is NaN"));
    let all = Span::to(100);
    let task = Task::new(ID, all, all, Span::to(2), &Mask::causal(100, 2)).unwrap();
    assert_eq!(task.flops(&geometry, Direction::Forward), 2.0 * 5050.0 * 8.0 * 96.0);
    assert_eq!(task.flops(&geometry, Direction::Backward), 2.0 * 5050.0 * 8.0 * (3.0 * 64.0 + 2.0 * 32.0));
    assert!(task.check(&HeadGeometry::standard(1, 1, 8).unwrap()).is_err());
}

#[test]
fn a_view_has_parts() {
    let data: Vec<f32> = (0..3 * 10).map(|x| x as f32).collect();
    let view = TensorView::new("x", &data, [3, 4, 2], 10).unwrap();
    let part = view.part(Span::at(1, 2), Span::at(2, 1)).unwrap();
    assert_eq!((part.shape(), part.row(0, 0), part.token(1)), ([2, 1, 2], &data[14..16], &data[24..26]));
    assert!(
        view.part(Span::at(2, 2), Span::to(1)).is_none() && view.part(Span::to(1), Span::at(4, 1)).is_none()
    );
    assert!(TensorView::new("x", &data[..27], [3, 4, 2], 10).is_err());
}

/// Element `d` of a head of a token.
fn element(tensor: AnyTensor<'_>, token: usize, head: usize, d: usize) -> f32 {
    match tensor {
        AnyTensor::F32(view) => view.row(token, head)[d],
        AnyTensor::Bf16(view) => view.row(token, head)[d].to_f32(),
        AnyTensor::F16(view) => view.row(token, head)[d].to_f32(),
    }
}

/// Tokens 10 to 13 of a document, with 2 heads of 3 elements, whose storage begins two elements earlier and holds one
/// token more.
#[track_caller]
fn check_slice(dtype: DType) {
    let values: Vec<f32> = (0..2 + 5 * 8).map(|x| x as f32).collect();
    let elements = Elements::rounded(dtype, values.clone());
    assert_eq!((elements.dtype(), elements.len(), &*elements.values()), (dtype, 42, &values[..]));
    let layout = TensorLayout { offset: 2, stride: 8, tokens: Span::at(10, 4), heads: 2, dim: 3 };
    let slice = TensorSlice::new("x", elements.clone(), layout).unwrap();
    assert_eq!((slice.dtype(), slice.bytes()), (dtype, 4 * 2 * 3 * dtype.bytes()));

    let last = slice.view_of(Span::at(13, 1)).unwrap();
    assert_eq!((last.dtype(), last.shape(), last.stride()), (dtype, [1, 2, 3], 8));
    assert_eq!((element(slice.view(), 3, 1, 2), element(last, 0, 1, 2)), (31.0, 31.0));
    assert!(slice.view_of(Span::at(13, 2)).is_none());
    let later = slice.with_tokens(Span::at(12, 3)).unwrap();
    assert_eq!((later.dtype(), element(later.view(), 2, 0, 0)), (dtype, 34.0));
    assert!(slice.with_tokens(Span::at(9, 1)).is_none() && slice.with_tokens(Span::at(14, 2)).is_none());

    assert_eq!(slice.identity(), later.identity());
    let copy = TensorSlice::new("x", Elements::rounded(dtype, values.clone()), layout).unwrap();
    assert_ne!(slice.identity(), copy.identity());

    let too_short = TensorSlice::contiguous("x", elements.clone(), Span::to(7), 2, 3 + 1).unwrap_err();
    assert!(too_short.to_string().starts_with("x holds 42 elements"), "{too_short}");
    let rows = slice.view().f32("lse");
    match dtype {
        DType::F32 => assert_eq!(rows.unwrap().row(0, 0), [2.0, 3.0, 4.0]),
        other => assert_eq!(rows.unwrap_err(), InvalidAttention::NotF32 { tensor: "lse", actual: other }),
    }
    assert_eq!(elements.into_f32().is_some(), dtype == DType::F32);
}

#[test]
fn a_slice_holds_elements_of_any_type() {
    DType::ALL.into_iter().for_each(check_slice);
    for dtype in DType::ALL {
        assert_eq!(dtype.to_string().parse(), Ok(dtype));
        assert_eq!((Elements::empty(dtype).dtype(), Elements::empty(dtype).is_empty()), (dtype, true));
    }
    assert!("f64".parse::<DType>().unwrap_err().to_string().contains("f32, bf16 or f16"));
    // Ties go to the even neighbour; what is too large for f16 is infinite.
    let rounded = |dtype, x: f32| Elements::rounded(dtype, [x]).values()[0];
    assert_eq!((rounded(DType::Bf16, 257.0), rounded(DType::Bf16, 259.0)), (256.0, 260.0));
    assert_eq!((rounded(DType::F16, 2049.0), rounded(DType::F16, 1e5)), (2048.0, f32::INFINITY));
}
