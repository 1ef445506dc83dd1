//! Fetches as a stream keeps track of them.

use outboard_attention::{
    DType, Direction, DocumentId, HeadGeometry, HeadShape, Mask, Span, Task, TensorSlice,
};
use outboard_proto::{ErrorKind, KeyHome, TaskError, TaskHeader, TensorKind, TensorRef, WireTask};

use super::{Arrivals, Fetch, WholeTask, costs};
use crate::{ByteBudget, ByteLease};

const HEADS: HeadShape = HeadShape {
    q_heads: 1,
    kv_heads: 1,
    head_dim: 2,
    v_head_dim: 2,
    scale: 1.0,
    dtype: DType::F32,
    softcap: None,
};

/// A task of `tokens` whose Q the client sends under id `100 + id`, and whose K and V, ids 1 and 2, are at a home.
fn task(id: u64, tokens: usize, carried: bool, last_use: bool) -> WireTask {
    let span = Span::to(tokens);
    let document = DocumentId { rank: 0, index: 0 };
    let header = TaskHeader {
        job: "test".to_owned(),
        step: 0,
        plan_epoch: 0,
        layer: 0,
        direction: Direction::Forward,
        tick: 0,
        attempt: 0,
        slot: 0,
        group: 0,
        position: 0,
        numerics_id: None,
        geometry: HeadGeometry::try_from(HEADS).unwrap(),
        task: Task::new(document, span, span, Span::to(1), &Mask::causal(tokens, 1)).unwrap(),
        result_dtype: DType::F32,
        deadline: None,
        key_homes: vec![KeyHome { tokens: span, rank: 3, address: "there:1".to_owned() }],
        group_tasks: 0,
    };
    let tensor = |id, kind| TensorRef { id, kind, tokens: span, carried, last_use };
    let q = TensorRef { carried: true, last_use: true, ..tensor(100 + id, TensorKind::Q) };
    let tensors = vec![q, tensor(1, TensorKind::K), tensor(2, TensorKind::V)];
    WireTask { id, header, tensors }
}

/// K and V whose elements are all `value`.
fn keys(tokens: usize, value: f32) -> [TensorSlice; 2] {
    [0, 1].map(|_| TensorSlice::contiguous("keys", vec![value; tokens * 2], Span::to(tokens), 1, 2).unwrap())
}

struct Bench {
    arrivals: Arrivals,
    budget: ByteBudget,
}

impl Bench {
    fn new() -> Bench {
        Bench { arrivals: Arrivals::new(100), budget: ByteBudget::new(1 << 20) }
    }

    fn announce(&mut self, task: WireTask) -> Option<Fetch> {
        self.arrivals.check(&task).unwrap();
        let lease = |&bytes: &u64| self.budget.try_lease(bytes).unwrap();
        let leases: Vec<ByteLease> = costs(&task).iter().map(lease).collect();
        let (fetch, whole) = self.arrivals.announce(task, leases, None);
        assert!(whole.is_none(), "Q has not come");
        fetch
    }

    /// Sends Q of a task, and gives back what has become whole.
    fn send_q(&mut self, task: u64, tokens: usize) -> Vec<WholeTask> {
        let data = bytes::Bytes::from(vec![0; tokens * 8]);
        let crc32c = crc32c::crc32c(&data);
        let chunk = outboard_proto::v1::Chunk { task, tensor: 100 + task, offset: 0, crc32c, data };
        self.arrivals.chunk(&chunk).unwrap()
    }

    fn check_free(&self) {
        assert_eq!(self.budget.used(), 0, "all memory is free");
    }
}

#[track_caller]
fn check_keys(whole: &[WholeTask], id: u64, tokens: usize, value: f32) {
    let [whole] = whole else { panic!("{} tasks are whole", whole.len()) };
    let inputs = &whole.inputs;
    assert_eq!((whole.id, inputs.k.tokens(), inputs.v.tokens()), (id, Span::to(tokens), Span::to(tokens)));
    for slice in [&inputs.k, &inputs.v] {
        let view = slice.view().f32("keys").unwrap();
        assert_eq!(view.data(), vec![value; tokens * 2]);
    }
}

#[test]
fn keys_of_a_fetch_given_up_do_not_pass_for_those_of_its_ids_next_owner() {
    let mut bench = Bench::new();
    let old = bench.announce(task(1, 5, true, true)).expect("keys to fetch");
    bench.arrivals.cancel(1);
    assert!(old.given_up.is_cancelled());
    let new = bench.announce(task(2, 7, true, true)).expect("keys to fetch");
    assert!(bench.send_q(2, 7).is_empty());
    assert!(bench.arrivals.fetched(&old, Ok((keys(5, 5.0), Vec::new()))).unwrap().is_empty());
    assert!(
        bench.arrivals.fetched(&old, Err(TaskError::internal("late"))).is_err_and(|failed| failed.is_empty())
    );
    assert!(!new.given_up.is_cancelled());
    check_keys(&bench.arrivals.fetched(&new, Ok((keys(7, 7.0), Vec::new()))).unwrap(), 2, 7, 7.0);
    drop((old, new));
    assert!(bench.arrivals.is_empty());
    bench.check_free();
}

#[test]
fn a_fetch_goes_on_while_a_task_waits_or_may_come() {
    let mut bench = Bench::new();
    let fetch = bench.announce(task(1, 5, true, false)).expect("keys to fetch");
    bench.arrivals.cancel(1);
    assert!(!fetch.given_up.is_cancelled(), "a later task may name them");
    assert!(bench.announce(task(2, 5, false, false)).is_none());
    assert!(bench.announce(task(3, 5, false, true)).is_none());
    bench.arrivals.cancel(3);
    assert!(!fetch.given_up.is_cancelled(), "task 2 waits");
    bench.arrivals.cancel(2);
    assert!(fetch.given_up.is_cancelled());
    assert!(bench.arrivals.fetched(&fetch, Ok((keys(5, 5.0), Vec::new()))).unwrap().is_empty());
    drop(fetch);
    bench.check_free();
}

#[test]
fn memory_of_keys_is_counted_until_their_fetch_has_ended() {
    let mut bench = Bench::new();
    let fetch = bench.announce(task(1, 5, true, true)).expect("keys to fetch");
    bench.arrivals.cancel(1);
    assert!(bench.budget.used() > 0, "the fetch may be writing to it");
    drop(fetch);
    bench.check_free();
}

#[test]
fn tasks_are_told_of_lost_keys_for_as_long_as_they_may_name_them() {
    let mut bench = Bench::new();
    let fetch = bench.announce(task(1, 5, true, false)).expect("keys to fetch");
    let error = TaskError::new(ErrorKind::Aborted, "lost");
    let failed = bench.arrivals.fetched(&fetch, Err(error)).expect_err("its task fails");
    assert_eq!(
        failed.iter().map(|(id, error)| (*id, error.kind)).collect::<Vec<_>>(),
        [(1, ErrorKind::Aborted)]
    );
    drop(fetch);
    bench.check_free();
    for (id, last_use) in [(2, false), (3, true)] {
        let later = task(id, 5, false, last_use);
        assert_eq!(bench.arrivals.check_given(&later).expect_err("they are lost").message, "lost");
        bench.announce(later);
        bench.arrivals.cancel(id);
    }
    let after = task(4, 5, false, true);
    bench.arrivals.check_given(&after).expect("nothing is known of them any more");
    assert!(
        bench.arrivals.check(&after).expect_err("nobody carries them").message.contains("carry it again")
    );
    bench.check_free();
}

#[test]
fn the_end_of_the_stream_fails_only_those_that_wait_for_chunks() {
    let mut bench = Bench::new();
    let fetch = bench.announce(task(1, 5, true, false)).expect("keys to fetch");
    assert!(bench.announce(task(2, 5, false, false)).is_none());
    assert!(bench.send_q(1, 5).is_empty());
    let given_up = bench.arrivals.end();
    assert_eq!(given_up.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2]);
    assert!(!fetch.given_up.is_cancelled());
    check_keys(&bench.arrivals.fetched(&fetch, Ok((keys(5, 5.0), Vec::new()))).unwrap(), 1, 5, 5.0);
    drop(fetch);
    bench.check_free();
}
