//! The CPU kernel against the f64 reference, for every instruction set of this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::kernel::{
    CpuKernel, Isa, KernelConfig, KernelError, KernelTask, Operands, QueryInput, Results, peak_loop,
};
use outboard_attention::{
    BandSlice, DType, Direction, HeadGeometry, HeadShape, InvalidAttention, MAX_TOKENS, Mask, MaskPart, Span,
    Task,
};

#[test]
fn random_tasks_agree_with_the_reference() {
    let mut random = Random(1);
    for _ in 0..cases(90) {
        let geometry = random_geometry(&mut random);
        // Keep the reference affordable: long documents for small heads.
        let work = geometry.q_heads() * (geometry.head_dim() + geometry.v_head_dim());
        let longest = ((cases(40_000_000) as f64 / work as f64).sqrt() as usize).clamp(20, 700);
        let tokens = random.within(1..=longest);
        let task = random_task(&mut random, &geometry, tokens);
        let case = Case::new(&mut random, geometry, task, 1.0);
        for isa in isas() {
            check(isa, &case);
        }
    }
}

#[test]
fn every_head_dim_works() {
    let mut random = Random(2);
    for dim in (1..=256).step_by(256 / cases(256)) {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let (scale, softcap) = (0.1, None);
            let v_head_dim = 1 + (dim * 37) % 256;
            let shape =
                HeadShape { q_heads: 2, kv_heads: 1, head_dim: dim, v_head_dim, scale, dtype, softcap };
            // Now and then long enough for a whole block of keys.
            let tokens = if dim % 16 == 3 { 150 } else { 19 };
            let case = Case::new(&mut random, shape.try_into().unwrap(), causal_task(tokens, 1), 1.0);
            for isa in isas() {
                check(isa, &case);
            }
        }
    }
}

/// A head of so many rows that it would be cut into chunks, without a cell, beside one with cells.
#[test]
fn a_long_head_without_keys_gives_zero_gradients() {
    let mut random = Random(10);
    let geometry = HeadGeometry::standard(16, 2, 8).unwrap();
    let all = Span::to(512);
    let slice = BandSlice::new(all, all, None, Some(0)).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::at(1, 1), slice }]).unwrap();
    let task = Task::new(DOCUMENT, all, all, Span::to(2), &mask).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    for isa in isas() {
        check(isa, &case);
    }
}

#[test]
fn bf16_heads_are_cut_into_chunks_too() {
    let mut random = Random(11);
    let shape = HeadGeometry::standard(8, 1, 16).unwrap().shape();
    let geometry = HeadShape { dtype: DType::Bf16, ..shape }.try_into().unwrap();
    let case = Case::new(&mut random, geometry, causal_task(560, 1), 1.0);
    for isa in isas() {
        check(isa, &case);
    }
}

/// Finite values so large that cells which do not count would overflow.
#[test]
fn extreme_values_stay_where_they_are_seen() {
    let mut random = Random(12);
    let geometry = HeadGeometry::standard(1, 1, 8).unwrap();
    let clean = Case::new(&mut random, geometry, causal_task(40, 1), 1.0);
    let mut low = clean.clone();
    low.lse.data[0] = -3e38;
    let mut large = clean.clone();
    large.d_o.data[..8].fill(1e19);
    large.v.data[20 * large.v.stride..][..8].fill(-2e18);
    large.d.data[0] = 2e38;
    for isa in isas() {
        let before = run_one(isa, &clean, Direction::Backward);
        for case in [&low, &large] {
            let [dq, dk, dv] = run_one(isa, case, Direction::Backward).try_into().unwrap();
            // The first row sees the first key alone.
            let finite = |x: &[f32]| x.iter().all(|x| x.is_finite());
            assert!(finite(&dq[8..20 * 8]) && finite(&dk[8..20 * 8]) && finite(&dv[8..20 * 8]), "{isa}");
            assert_eq!(dv[30 * 8..], before[2][30 * 8..], "{isa}");
        }
    }
}

#[test]
fn a_softcap_holds_whatever_comes() {
    let mut random = Random(13);
    let shape = HeadGeometry::standard(2, 1, 16).unwrap().shape();
    for (softcap, size) in [(1e-37, 1.0), (2.0, 1e18), (1e30, 1.0)] {
        let geometry = HeadShape { softcap: Some(softcap), ..shape }.try_into().unwrap();
        let case = Case::new(&mut random, geometry, causal_task(150, 1), size);
        for isa in isas() {
            let actual = run_one(isa, &case, Direction::Forward);
            for (name, (actual, expected)) in
                ["o", "lse"].iter().zip(actual.iter().zip(case.reference(Direction::Forward)))
            {
                check_close(&format!("{name} with softcap {softcap} on {isa}"), actual, &expected, 1e-5);
            }
        }
    }
}

/// The sign of a zero must not tell what a neighbour sees.
#[test]
fn zeros_of_o_are_positive() {
    let mut random = Random(14);
    let geometry = HeadGeometry::standard(1, 1, 8).unwrap();
    let mut case = Case::new(&mut random, geometry, causal_task(300, 1), 1.0);
    case.q.data.fill(1.0);
    for (key, row) in case.k.data.chunks_mut(case.k.stride).enumerate() {
        row[..8].fill(if key < 128 { 0.0 } else { 20.0 });
    }
    case.v.data.fill(-0.0);
    case.v.data[0] = -1e-30;
    for isa in isas() {
        let o = run_one(isa, &case, Direction::Forward).remove(0);
        assert!(o[130 * 8..].iter().all(|x| x.to_bits() == 0), "{isa}");
    }
}

#[test]
fn documents_end_at_the_largest_position() {
    let mut random = Random(15);
    let geometry = HeadGeometry::standard(4, 2, 16).unwrap();
    let span = Span::at(MAX_TOKENS - 200, 200);
    let slice = BandSlice::new(span, span, Some(-70), Some(0)).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::to(2), slice }]).unwrap();
    let case =
        Case::new(&mut random, geometry, Task::new(DOCUMENT, span, span, Span::to(2), &mask).unwrap(), 1.0);
    for isa in isas() {
        check(isa, &case);
    }

    // So many rows that their elements would not fit an address.
    let rows = Span::to(6_148_914_691_236_517_206);
    let slice = BandSlice::new(rows, Span::to(1), None, None).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::to(2), slice }]).unwrap();
    let task = Task::new(DOCUMENT, rows, Span::to(1), Span::to(2), &mask).unwrap();
    let geometry = HeadGeometry::standard(6, 2, 16).unwrap();
    let tensor = Tensor::of(vec![0.0; 2 * 16], [1, 2, 16]);
    let operands = Operands::Forward { q: QueryInput::InPlace, k: tensor.any(), v: tensor.any() };
    let results = Results::Forward { o: vec![0.0; 64], lse: vec![0.0; 4] };
    let error = refusal(KernelTask { geometry, task: &task, operands, results });
    assert!(error.to_string().contains("task.q.end"), "{error}");
}

#[test]
fn short_shards_of_every_row_count_work() {
    let mut random = Random(3);
    let geometry = HeadGeometry::standard(1, 1, 16).unwrap();
    for rows in 1..70 {
        let mask = Mask::causal(400, 1);
        let task =
            Task::new(DOCUMENT, Span::at(400 - rows, rows), Span::to(400), Span::to(1), &mask).unwrap();
        let case = Case::new(&mut random, geometry, task, 1.0);
        for isa in isas() {
            check(isa, &case);
        }
    }
}

#[test]
fn a_head_cut_into_backward_chunks_agrees() {
    let mut random = Random(4);
    let geometry = HeadGeometry::standard(8, 1, 8).unwrap();
    let all = Span::to(700);
    let slices = [
        BandSlice::new(all, all, Some(-90), Some(0)).unwrap(),
        BandSlice::new(Span::at(500, 100), Span::at(0, 64), None, Some(-91)).unwrap(),
    ];
    let parts = slices.map(|slice| MaskPart { kv_heads: Span::to(1), slice });
    let task = Task::new(DOCUMENT, all, all, Span::to(1), &Mask::new(parts.to_vec()).unwrap()).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    for isa in isas() {
        check(isa, &case);
    }
}

#[test]
fn rows_without_keys_give_zero_and_minus_infinity() {
    let mut random = Random(5);
    let geometry = HeadGeometry::standard(4, 2, 24).unwrap();
    let slice = BandSlice::new(Span::at(40, 30), Span::at(10, 90), None, Some(-20)).unwrap();
    let mask = Mask::new(vec![MaskPart { kv_heads: Span::at(1, 1), slice }]).unwrap();
    let task = Task::new(DOCUMENT, Span::to(100), Span::to(100), Span::to(2), &mask).unwrap();
    let case = Case::new(&mut random, geometry, task, 1.0);
    for isa in isas() {
        check(isa, &case);
        let forward = run_one(isa, &case, Direction::Forward);
        let backward = run_one(isa, &case, Direction::Backward);
        assert!(forward[0][..40 * 4 * 24].iter().all(|x| x.to_bits() == 0));
        assert!(forward[1][..40 * 4].iter().all(|x| *x == f32::NEG_INFINITY));
        assert!(backward[0][..40 * 4 * 24].iter().all(|x| *x == 0.0));
        assert!(backward[1].chunks(2 * 24).all(|key| key[..24].iter().all(|x| *x == 0.0)));
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut random = Random(6);
    for (size, tolerance) in [(30.0, 2e-4), (1e3, 0.2)] {
        let geometry = HeadGeometry::standard(2, 1, 64).unwrap();
        let case = Case::new(&mut random, geometry, causal_task(300, 1), size);
        for isa in isas() {
            // Weights depend on differences of scores in the thousands or millions, so f32 leaves little accuracy;
            // the reference's LSE tells where a row's weight lies all the same.
            let actual = run_one(isa, &case, Direction::Forward);
            let expected = case.reference(Direction::Forward);
            check_close("lse", &actual[1], &expected[1], 1e-5);
            check_close("o", &actual[0], &expected[0], tolerance);
            for gradient in run_one(isa, &case, Direction::Backward) {
                assert!(gradient.iter().all(|x| x.is_finite()));
            }
        }
    }
}

/// A non-finite element shows in what its row or key meets in a cell that counts, and changes nothing else.
#[test]
fn nan_and_infinity_show_where_they_are_seen_and_nowhere_else() {
    let mut random = Random(7);
    for round in 0..cases(40) {
        let shape = random_geometry(&mut random).shape();
        let geometry = HeadShape { head_dim: 16, v_head_dim: 24, ..shape }.try_into().unwrap();
        let tokens = random.within(100..=400);
        let task = random_task(&mut random, &geometry, tokens);
        let clean = Case::new(&mut random, geometry, task, 1.0);
        let value = random.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        let tensor = round % 6;
        let mut case = clean.clone();
        let Case { q, k, v, d_o, lse, d, .. } = &mut case;
        let name_of = ["q", "k", "v", "d_o", "lse", "d"][tensor];
        let of_row = ![false, true, true, false, false, false][tensor];
        let poisoned = &mut [q, k, v, d_o, lse, d][tensor];
        let [tokens, heads, dim] = poisoned.shape;
        let (token, head) = (random.below(tokens), random.below(heads));
        let poisoned_token = token;
        poisoned.data[token * poisoned.stride + head * dim + random.below(dim)] = value;
        if tensor < 4 {
            **poisoned = poisoned.clone().rounded(geometry.dtype());
        }

        let (group, q_heads) = (geometry.group(), case.task.kv_heads().len() * geometry.group());
        let mask = |row: usize, kv_head: usize, key: usize| {
            let (position, key) = (case.task.q().start() + row, case.task.kv().start() + key);
            let kv_head = case.task.kv_heads().start() + kv_head;
            case.task.mask().slices_of(kv_head).any(|s| s.keys_of(position).contains(key))
        };
        // Whether a query row and head, or a key and kv head, meets the poisoned element.
        let kv_heads = case.task.kv_heads().len();
        let row_meets = |row: usize, h: usize| {
            if of_row { row == token && h == head } else { h / group == head && mask(row, head, token) }
        };
        let key_meets = |key: usize, h: usize| {
            if of_row {
                h == head / group && mask(token, h, key)
            } else {
                // Through a row that sees both keys, or as the key itself.
                h == head && (0..case.task.q().len()).any(|row| mask(row, h, token) && mask(row, h, key))
            }
        };
        for isa in isas() {
            for direction in [Direction::Forward, Direction::Backward] {
                if direction == Direction::Forward && tensor > 2 {
                    continue;
                }
                let names: &[_] =
                    if direction == Direction::Forward { &["o", "lse"] } else { &["dq", "dk", "dv"] };
                let before = run_one(isa, &clean, direction);
                let after = run_one(isa, &case, direction);
                for ((name, before), after) in names.iter().zip(&before).zip(&after) {
                    let of_keys = name.starts_with("dk") || name.starts_with("dv");
                    let heads = if of_keys { kv_heads } else { q_heads };
                    let tokens = if of_keys { case.task.kv().len() } else { case.task.q().len() };
                    let dim = before.len() / heads / tokens;
                    for at in 0..tokens * heads {
                        let (token, head) = (at / heads, at % heads);
                        let meets = if of_keys { key_meets(token, head) } else { row_meets(token, head) };
                        let (before, after) = (&before[at * dim..][..dim], &after[at * dim..][..dim]);
                        let what = format!("{name} of {token}, {head} on {isa}: tensor {tensor} {value}");
                        if !meets {
                            assert_eq!(before, after, "{what}, {:?} {:?}", case.geometry, case.task);
                        }
                        let itself = token == poisoned_token;
                        let must_show = match (name_of, *name) {
                            ("q" | "lse" | "d_o", _) => true,
                            ("k" | "v", "o" | "dq") | ("k", "lse") | ("d", "dq" | "dk") => true,
                            ("k", "dk" | "dv") | ("v", "dk") => itself,
                            _ => false,
                        };
                        if meets && value.is_nan() && must_show {
                            assert!(after.iter().any(|x| x.is_nan()), "{what} is hidden");
                        }
                    }
                }
            }
        }
    }
}

fn refusal(task: KernelTask<'_>) -> KernelError {
    let mut kernel = kernel(Isa::Portable, 1);
    kernel.run(vec![task], &|_, _| unreachable!("nothing may be computed")).unwrap_err()
}

#[test]
fn errors_name_the_field() {
    let mut random = Random(8);
    let geometry = HeadGeometry::standard(2, 1, 8).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(10, 1), 1.0);

    let mut task = case.kernel_task(Direction::Forward);
    task.geometry = HeadShape { dtype: DType::Bf16, ..geometry.shape() }.try_into().unwrap();
    let error = refusal(task);
    assert!(error.to_string().contains("q holds f32; the geometry says bf16"), "{error}");

    let other = Case::new(&mut random, geometry, causal_task(11, 1), 1.0);
    for (direction, name) in [(Direction::Forward, "q"), (Direction::Backward, "q")] {
        let mut task = case.kernel_task(direction);
        task.operands = other.operands(direction);
        let error = refusal(task);
        let KernelError::Invalid { source: InvalidAttention::ShapeMismatch { tensor, .. }, .. } = error
        else {
            panic!("{error}");
        };
        assert_eq!(tensor, name);
    }

    let mut task = case.kernel_task(Direction::Backward);
    task.results = Results::zeroed(&case.task, &geometry, Direction::Forward);
    assert!(refusal(task).to_string().contains("operands are backward, results are forward"));

    let mut task = case.kernel_task(Direction::Forward);
    if let Results::Forward { lse, .. } = &mut task.results {
        lse.pop();
    }
    assert!(refusal(task).to_string().contains("results.lse holds 19 elements; the task needs 20"));

    let config = KernelConfig::new(Isa::Portable, 0);
    assert_eq!(CpuKernel::new(config).unwrap_err(), KernelError::NoThreads);
}

#[test]
fn one_bad_task_stops_the_batch() {
    let mut random = Random(9);
    let geometry = HeadGeometry::standard(2, 1, 8).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(10, 1), 1.0);
    let good = case.kernel_task(Direction::Forward);
    let mut bad = case.kernel_task(Direction::Forward);
    bad.geometry = HeadGeometry::standard(1, 1, 8).unwrap();
    let mut kernel = kernel(Isa::Portable, 1);
    let error = kernel.run(vec![good, bad], &|_, _| unreachable!("nothing may be computed")).unwrap_err();
    assert!(error.to_string().starts_with("task 1 of the batch: q has shape"), "{error}");
    kernel.run(Vec::new(), &|_, _| unreachable!("there is nothing")).unwrap();
}

#[test]
fn isas_have_names_and_do_their_flops() {
    for isa in isas() {
        assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        assert!(peak_loop(isa, DType::F32, 10) >= 10.0 * 2.0 * 4.0 * 8.0);
        let id = |dtype| kernel(isa, 1).numerics_id(dtype);
        assert_eq!(id(DType::Bf16), format!("cpu-{isa}-bf16-r2"));
        // The dot product of bf16 pairs changes nothing for others.
        assert!(!id(DType::F32).contains("avx512-bf16"));
    }
    assert!("sse9".parse::<Isa>().unwrap_err().to_string().contains("sse9"));
    assert!(Isa::detect().is_available());
}
