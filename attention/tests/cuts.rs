//! What may not show in the bits: batches, threads, query cuts and head cuts. What may show only as rounding: key cuts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::*;
use outboard_attention::kernel::{Isa, KernelTask, Operands, Results};
use outboard_attention::merge::{Corner, GradientPartial, OutputMerge, TensorViewMut, add_gradients};
use outboard_attention::{Direction, HeadGeometry, Span, Task, TensorView};

const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Backward];

/// Tasks of mixed sizes, among them some that the backward pass cuts into chunks.
fn mixed_cases(random: &mut Random) -> Vec<Case> {
    let mut cases = Vec::new();
    for _ in 0..8 {
        let geometry = random_geometry(random);
        let tokens = random.within(1..=120);
        let task = random_task(random, &geometry, tokens);
        cases.push(Case::new(random, geometry, task, 1.0));
    }
    let geometry = HeadGeometry::standard(16, 2, 8).unwrap();
    let task = random_task(random, &geometry, 700);
    cases.push(Case::new(random, geometry, task, 1.0));
    cases.push(Case::new(random, geometry, causal_task(600, 2), 1.0));
    cases
}

#[test]
fn batches_and_threads_leave_no_trace() {
    let mut random = Random(21);
    let cases = mixed_cases(&mut random);
    for isa in isas() {
        let both = || DIRECTIONS.into_iter().flat_map(|d| cases.iter().map(move |c| c.kernel_task(d)));
        let alone: Vec<_> = both().map(|task| bits(&run(&mut kernel(isa, 1), vec![task])[0])).collect();
        for threads in [1, 2, 5] {
            let mut kernel = kernel(isa, threads);
            // The second and third time the workspaces are warm, and full of the other order's leftovers.
            for order in ["as is", "backwards", "as is"] {
                let mut order_of: Vec<usize> = (0..alone.len()).collect();
                if order == "backwards" {
                    order_of.reverse();
                }
                let mut tasks: Vec<_> = both().map(Some).collect();
                let batch = order_of.iter().map(|n| tasks[*n].take().unwrap()).collect();
                for (n, results) in order_of.iter().zip(run(&mut kernel, batch)) {
                    assert_eq!(bits(&results), alone[*n], "{isa}, {threads} threads, {order}, task {n}");
                }
            }
        }
    }
}

/// A piece of a case's task, with its own part of every tensor.
struct Piece {
    task: Task,
    q: Span,
    kv: Span,
    heads: Span,
}

impl Piece {
    /// The piece at the given offsets within the case's task, `None` when it holds no cell.
    fn of(case: &Case, q: Span, kv: Span, heads: Span) -> Option<Piece> {
        let within = |whole: Span, part: Span| Span::at(whole.start() + part.start(), part.len());
        let whole = &case.task;
        let spans = [within(whole.q(), q), within(whole.kv(), kv), within(whole.kv_heads(), heads)];
        let task = Task::new(DOCUMENT, spans[0], spans[1], spans[2], whole.mask()).ok()?;
        Some(Piece { task, q, kv, heads })
    }

    fn q_heads(&self, case: &Case) -> Span {
        let group = case.geometry.group();
        Span::at(self.heads.start() * group, self.heads.len() * group)
    }

    fn run(&self, isa: Isa, case: &Case, direction: Direction) -> Vec<Tensor> {
        let row = |tensor: &Tensor| tensor.part(self.q, self.q_heads(case));
        let key = |tensor: &Tensor| tensor.part(self.kv, self.heads);
        let [q, k, v] = [row(&case.q), key(&case.k), key(&case.v)];
        let [d_o, lse, d] = [row(&case.d_o), row(&case.lse), row(&case.d)];
        let (lse, d) = (lse.view(), d.view());
        let (q, k, v, d_o) = (q.any(), k.any(), v.any(), d_o.any());
        let operands = match direction {
            Direction::Forward => Operands::Forward { q: q.into(), k, v },
            Direction::Backward => Operands::Backward { q, k, v, d_o: d_o.into(), lse, d },
        };
        let results = Results::zeroed(&self.task, &case.geometry, direction);
        let task = KernelTask { geometry: case.geometry, task: &self.task, operands, results };
        let shapes = self.task.shapes(&case.geometry);
        let shapes = match direction {
            Direction::Forward => vec![shapes.o, shapes.row],
            Direction::Backward => vec![shapes.q, shapes.k, shapes.v],
        };
        let results = run(&mut kernel(isa, 1), vec![task]).remove(0);
        results.into_iter().zip(shapes).map(|(data, shape)| Tensor::of(data, shape)).collect()
    }
}

/// Cuts `[0, len)` at up to `cuts` random places.
fn cut(random: &mut Random, len: usize, cuts: usize) -> Vec<Span> {
    let mut at: Vec<usize> = (0..random.within(0..=cuts)).map(|_| random.within(0..=len)).collect();
    at.extend([0, len]);
    at.sort_unstable();
    at.dedup();
    at.windows(2).map(|w| Span::new(w[0], w[1]).unwrap()).collect()
}

fn view_bits(view: TensorView<'_>) -> Vec<u32> {
    (0..view.shape()[0]).flat_map(|t| view.token(t).iter().map(|x| x.to_bits())).collect()
}

#[test]
fn query_and_head_cuts_leave_no_trace() {
    let mut random = Random(22);
    for _ in 0..cases(40) {
        let geometry = random_geometry(&mut random);
        let tokens = random.within(1..=300);
        let task = random_task(&mut random, &geometry, tokens);
        // Large scores make rows rescale at different blocks.
        let size = random.pick(&[1.0, 8.0]);
        let case = Case::new(&mut random, geometry, task, size);
        let [rows, keys, heads] = [case.task.q(), case.task.kv(), case.task.kv_heads()].map(Span::len);
        for isa in isas() {
            for direction in DIRECTIONS {
                let whole = run_one(isa, &case, direction);
                let shapes = case.task.shapes(&geometry);
                let kept: &[_] = match direction {
                    Direction::Forward => &[shapes.o, shapes.row],
                    Direction::Backward => &[shapes.q],
                };
                for q in cut(&mut random, rows, 4) {
                    for kv_heads in cut(&mut random, heads, 2) {
                        let Some(piece) = Piece::of(&case, q, Span::to(keys), kv_heads) else { continue };
                        let results = piece.run(isa, &case, direction);
                        for (n, (shape, result)) in kept.iter().zip(&results).enumerate() {
                            let whole = TensorView::contiguous("whole", &whole[n], *shape).unwrap();
                            let expected = whole.part(q, piece.q_heads(&case)).unwrap();
                            let equal = view_bits(result.view()) == view_bits(expected);
                            assert!(
                                equal,
                                "{direction} tensor {n} on {isa}: {:?} of {:?}",
                                piece.task, case.task
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn head_cuts_leave_no_trace_in_dk_and_dv() {
    let mut random = Random(23);
    let geometry = HeadGeometry::standard(24, 3, 8).unwrap();
    let case = Case::new(&mut random, geometry, causal_task(530, 3), 1.0);
    let shapes = case.task.shapes(&geometry);
    for isa in isas() {
        let whole = run_one(isa, &case, Direction::Backward);
        for head in 0..3 {
            let one = Span::at(head, 1);
            let piece = Piece::of(&case, Span::to(530), Span::to(530), one).unwrap();
            let results = piece.run(isa, &case, Direction::Backward);
            for (n, shape) in [(1, shapes.k), (2, shapes.v)] {
                let whole = TensorView::contiguous("whole", &whole[n], shape).unwrap();
                let expected = whole.part(Span::to(530), one).unwrap();
                assert!(
                    view_bits(results[n].view()) == view_bits(expected),
                    "{isa}, head {head}, tensor {n}"
                );
            }
        }
    }
}

#[test]
fn any_cut_merges_to_the_reference() {
    let mut random = Random(24);
    for _ in 0..cases(40) {
        let geometry = random_geometry(&mut random);
        let tokens = random.within(1..=260);
        let task = random_task(&mut random, &geometry, tokens);
        let case = Case::new(&mut random, geometry, task, 1.0);
        let [rows, keys, heads] = [case.task.q(), case.task.kv(), case.task.kv_heads()].map(Span::len);
        let mut pieces = Vec::new();
        for q in cut(&mut random, rows, 3) {
            for kv in cut(&mut random, keys, 3) {
                let kv_heads = cut(&mut random, heads, 1);
                pieces.extend(kv_heads.into_iter().filter_map(|heads| Piece::of(&case, q, kv, heads)));
            }
        }
        for isa in isas() {
            check_merged(isa, &case, &pieces);
        }
    }
}

/// Computes the pieces, puts them together at home and compares with the reference of the whole.
fn check_merged(isa: Isa, case: &Case, pieces: &[Piece]) {
    let tolerance = tolerance(isa, case.geometry.dtype());
    let shapes = case.task.shapes(&case.geometry);
    let zeros = |shape: [usize; 3]| vec![f32::NAN; shape.iter().product()];
    let (mut o, mut lse) = (zeros(shapes.o), zeros(shapes.row));
    let mut merge = OutputMerge::new(
        TensorViewMut::contiguous("o", &mut o, shapes.o).unwrap(),
        TensorViewMut::contiguous("lse", &mut lse, shapes.row).unwrap(),
    )
    .unwrap();
    for piece in pieces {
        let out = piece.run(isa, case, Direction::Forward);
        let at = Corner { row: piece.q.start(), head: piece.q_heads(case).start() };
        merge.add(at, out[0].view(), out[1].view()).unwrap();
    }
    for ((name, actual), expected) in
        [("o", &o), ("lse", &lse)].iter().zip(case.reference(Direction::Forward))
    {
        check_close(&format!("merged {name} on {isa} of {:?}", case.task), actual, &expected, tolerance);
    }

    let partials: Vec<_> = pieces.iter().map(|piece| piece.run(isa, case, Direction::Backward)).collect();
    let expected = case.reference(Direction::Backward);
    for (n, (name, shape)) in [("dq", shapes.q), ("dk", shapes.k), ("dv", shapes.v)].into_iter().enumerate() {
        let mut home = vec![0.0; shape.iter().product()];
        let mut view = TensorViewMut::contiguous(name, &mut home, shape).unwrap();
        let mut planned: Vec<_> = pieces
            .iter()
            .zip(&partials)
            .enumerate()
            .map(|(order, (piece, tensors))| {
                let corner = match name {
                    "dq" => Corner { row: piece.q.start(), head: piece.q_heads(case).start() },
                    _ => Corner { row: piece.kv.start(), head: piece.heads.start() },
                };
                let (group, position) = (order as u32 / 3, order as u32 % 3);
                GradientPartial { group, position, at: corner, values: tensors[n].view() }
            })
            .collect();
        planned.reverse();
        add_gradients(&mut view, planned).unwrap();
        check_close(&format!("merged {name} on {isa} of {:?}", case.task), &home, &expected[n], tolerance);
    }
}
