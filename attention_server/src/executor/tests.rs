//! The executor on a device that overlaps batches, and misbehaves as the tasks say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outboard_attention::kernel::{KernelTask, Operands, QueryInput, Results};
use outboard_attention::{
    AnyTensor, DType, Direction, DocumentId, Elements, HeadGeometry, Mask, Span, Task, TensorSlice,
};
use outboard_proto::{ErrorKind, TaskError, TaskHeader};
use outboard_transport::{InProcess, Pending, TaskHandler, TaskInputs, TaskOutcome, TaskRequest, Transport};
use tokio::runtime::Handle;

use crate::device::{Admission, Device, DeviceError, Ended, Facts, OnEnd, Opened};
use crate::{Engine, ServerError, ServiceOptions, serve_engine};

const WAVE: Duration = Duration::from_millis(5);
const LANES: usize = 3;

/// What befalls a task; it travels as the rank of the task's document.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u32)]
enum Fate {
    Computed,
    /// The batch is refused because of it.
    TooLarge,
    /// Its wave fails.
    WaveFails,
    /// Its wave fails, and every later one.
    DeviceDies,
    /// Its wave ends without a word of it.
    Forgotten,
    /// Its wave never ends.
    Hangs,
    /// The device panics when it begins, or ends.
    PanicsAtBegin,
    PanicsAtEnd,
    /// The device panics when it is asked whether its wave has ended.
    PanicsWhenAsked,
    /// Nothing of its batch is on its way, although no task is at fault.
    BatchRefused,
}

const FATES: [Fate; 10] = [
    Fate::Computed,
    Fate::TooLarge,
    Fate::WaveFails,
    Fate::DeviceDies,
    Fate::Forgotten,
    Fate::Hangs,
    Fate::PanicsAtBegin,
    Fate::PanicsAtEnd,
    Fate::PanicsWhenAsked,
    Fate::BatchRefused,
];

/// What a device was seen to do.
#[derive(Debug, Default)]
struct Seen {
    /// Tasks of each batch that it took.
    batches: Vec<usize>,
    /// Batches that began while waves of others were under way.
    overlapping: usize,
    waves: usize,
    /// The most waves under way at once.
    most_under_way: usize,
    threads: BTreeSet<String>,
    closed: bool,
}

/// Computes O as the first element of Q, in waves of at most `wave_tasks` tasks that end in reverse order.
struct Fake {
    seen: Arc<Mutex<Seen>>,
    wave: Duration,
    wave_tasks: usize,
    running: VecDeque<Wave>,
    busy: f64,
    dead: bool,
}

struct Wave {
    until: Instant,
    tasks: Vec<(u64, usize, Fate, Results)>,
}

#[derive(Debug)]
struct Anything;

impl Admission for Anything {
    fn admit(&self, _: &TaskHeader) -> Result<(), TaskError> {
        Ok(())
    }
}

fn fails(kind: ErrorKind, message: &str, fatal: bool) -> DeviceError {
    DeviceError { error: TaskError::new(kind, message), fatal }
}

fn fate(task: &KernelTask<'_>) -> Fate {
    FATES[task.task.document().rank as usize]
}

fn computed(task: KernelTask<'_>) -> Results {
    let Operands::Forward { q: QueryInput::View(AnyTensor::F32(q)), .. } = task.operands else {
        panic!("the tasks of these tests are forward, in f32");
    };
    let Results::Forward { mut o, lse } = task.results else { panic!("so are their results") };
    o.fill(q.data()[0]);
    Results::Forward { o, lse }
}

impl Device for Fake {
    fn begin(
        &mut self,
        number: u64,
        batch: Vec<KernelTask<'_>>,
        ended: OnEnd<'_>,
    ) -> Result<(), DeviceError> {
        if batch.iter().any(|task| fate(task) == Fate::PanicsAtBegin) {
            panic!("at begin, as the task says");
        }
        if batch.iter().any(|task| fate(task) == Fate::TooLarge) {
            return Err(fails(ErrorKind::Internal, "some task is too large", false));
        }
        if batch.iter().any(|task| fate(task) == Fate::BatchRefused) {
            return Err(fails(ErrorKind::Unavailable, "no memory", false));
        }
        {
            let mut seen = self.seen.lock().unwrap();
            seen.batches.push(batch.len());
            seen.overlapping += usize::from(!self.running.is_empty());
            seen.threads.insert(std::thread::current().name().unwrap_or_default().to_owned());
        }
        let mut tasks = batch.into_iter().enumerate();
        loop {
            let wave: Vec<_> = tasks.by_ref().take(self.wave_tasks).collect();
            if wave.is_empty() {
                return Ok(());
            }
            while self.running.len() >= LANES {
                self.finish(ended);
            }
            let tasks =
                wave.into_iter().map(|(index, task)| (number, index, fate(&task), computed(task))).collect();
            let before = self.running.back().map_or_else(Instant::now, |wave| wave.until);
            self.running.push_back(Wave { until: before.max(Instant::now()) + self.wave, tasks });
            let mut seen = self.seen.lock().unwrap();
            seen.waves += 1;
            seen.most_under_way = seen.most_under_way.max(self.running.len());
        }
    }

    fn check(&self, task: &KernelTask<'_>) -> Result<(), DeviceError> {
        match fate(task) {
            Fate::TooLarge => Err(fails(ErrorKind::TooLarge, "it is too large", false)),
            _ => Ok(()),
        }
    }

    fn under_way(&self) -> usize {
        self.running.len()
    }

    fn is_ready(&self) -> bool {
        let has = |wave: &Wave, fate| wave.tasks.iter().any(|(_, _, own, _)| *own == fate);
        let asked = self.running.front().is_some_and(|wave| has(wave, Fate::PanicsWhenAsked));
        assert!(!asked, "when asked, as the task says");
        let hangs = |wave: &Wave| has(wave, Fate::Hangs);
        self.running.front().is_some_and(|wave| wave.until <= Instant::now() && !hangs(wave))
    }

    fn is_full(&self) -> bool {
        self.running.len() >= LANES
    }

    fn finish(&mut self, ended: OnEnd<'_>) {
        let Some(Wave { until, tasks }) = self.running.pop_front() else { return };
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        self.busy += self.wave.as_secs_f64();
        let has = |fate| tasks.iter().any(|(_, _, own, _)| *own == fate);
        assert!(!has(Fate::PanicsAtEnd), "at end, as the task says");
        self.dead |= has(Fate::DeviceDies);
        let error = match (self.dead, has(Fate::WaveFails)) {
            (true, _) => Some(fails(ErrorKind::Unavailable, "the bus is gone", true)),
            (_, true) => Some(fails(ErrorKind::Unavailable, "the wave failed", false)),
            _ => None,
        };
        for (batch, index, fate, results) in tasks.into_iter().rev() {
            if fate == Fate::Forgotten {
                continue;
            }
            // Once is enough: the second is for a task that has ended.
            for _ in 0..2 {
                let results = error.clone().map_or_else(|| Ok(results.clone()), Err);
                ended(Ended { batch, index, results });
            }
        }
        ended(Ended {
            batch: u64::MAX,
            index: 0,
            results: Err(fails(ErrorKind::Internal, "nobody's", false)),
        });
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(500)
    }

    fn busy_seconds(&self) -> Option<f64> {
        Some(self.busy)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.seen.lock().unwrap().closed = true;
    }
}

fn start(wave_tasks: usize, batch_tasks: usize) -> (Engine, Arc<Mutex<Seen>>) {
    start_slow(WAVE, wave_tasks, batch_tasks)
}

fn start_slow(wave: Duration, wave_tasks: usize, batch_tasks: usize) -> (Engine, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let shared = Arc::clone(&seen);
    let flops = {
        let TaskHeader { task, geometry, direction, .. } = request(0, Fate::Computed).header;
        task.flops(&geometry, direction)
    };
    let open = move || {
        let device =
            Fake { seen: shared, wave, wave_tasks, running: VecDeque::new(), busy: 0.0, dead: false };
        let facts = Facts {
            name: "fake:0".to_owned(),
            threads: None,
            numerics_ids: vec![(DType::F32, "fake".into())],
            batch_flops: flops * batch_tasks as f64,
            admission: Box::new(Anything),
        };
        Ok(Opened { device: Box::new(device), facts })
    };
    (Engine::start_on(open, 1 << 30, 1 << 30).unwrap(), seen)
}

fn request(n: u32, fate: Fate) -> TaskRequest {
    let tokens = Span::to(8);
    let geometry = HeadGeometry::standard(1, 1, 4).unwrap();
    let document = DocumentId { rank: fate as u32, index: n };
    let task = Task::new(document, tokens, tokens, Span::to(1), &Mask::causal(8, 1)).unwrap();
    let tensor = |name| {
        let elements = Elements::rounded(DType::F32, vec![n as f32; 32]);
        TensorSlice::contiguous(name, elements, tokens, 1, 4).unwrap()
    };
    let inputs = TaskInputs { q: tensor("q"), k: tensor("k"), v: tensor("v"), gradient: None };
    let header = TaskHeader {
        job: "test".into(),
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
        geometry,
        task,
        result_dtype: DType::F32,
        deadline: None,
        key_homes: Vec::new(),
        group_tasks: 0,
    };
    TaskRequest::new(header, inputs)
}

fn ship(engine: &Engine, fates: &[Fate]) -> Vec<Pending> {
    let transport = InProcess::new(Arc::new(engine.clone()), Handle::current());
    transport.ship(fates.iter().enumerate().map(|(n, &fate)| request(n as u32, fate)).collect())
}

/// Ends of tasks, with what is wrong with those that were computed.
async fn ends(pending: Vec<Pending>) -> Vec<Result<TaskOutcome, TaskError>> {
    let mut ends = Vec::new();
    for (n, pending) in pending.into_iter().enumerate() {
        let end = tokio::time::timeout(Duration::from_secs(60), pending).await.expect("every task ends");
        match &end {
            Ok(outcome) => {
                let Results::Forward { o, .. } = &outcome.results else { panic!("{outcome:?}") };
                assert!(o.iter().all(|&x| x == n as f32), "task {n} got the results of {}", o[0]);
            }
            Err(error) => assert!(!error.message.contains("connection ended"), "task {n} got no reply"),
        }
        ends.push(end);
    }
    ends
}

/// Every task has ended once, nothing is held, and the device's thread ends when it should. It closes the device, but not
/// one that is lost, since that might never end.
async fn settled(engine: Engine, seen: &Mutex<Seen>, ends: &[Result<TaskOutcome, TaskError>]) {
    let closed = engine.lost().is_none();
    engine.idle(Duration::from_secs(10)).await.unwrap();
    let stats = engine.stats();
    let computed = ends.iter().filter(|end| end.is_ok()).count() as u64;
    assert_eq!((stats.forward_tasks, stats.failed_tasks), (computed, ends.len() as u64 - computed));
    engine.close();
    let limit = Instant::now() + Duration::from_secs(10);
    while !(seen.lock().unwrap().closed == closed && engine.budget().used() == 0) {
        assert!(Instant::now() < limit, "held: {}, {seen:?}", engine.budget().used());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What would be closed after all is closed soon.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((engine.tasks(), seen.lock().unwrap().closed), (0, closed));
}

fn kinds(ends: &[Result<TaskOutcome, TaskError>]) -> Vec<Option<ErrorKind>> {
    ends.iter().map(|end| end.as_ref().err().map(|error| error.kind)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_overlap_and_every_task_ends_once() {
    let (engine, seen) = start(2, 3);
    let ends = ends(ship(&engine, &[Fate::Computed; 60])).await;
    assert!(ends.iter().all(Result::is_ok));
    let by_tasks: Duration = ends.iter().flatten().map(|outcome| outcome.compute).sum();
    settled(engine.clone(), &seen, &ends).await;
    // The device counts its time, and the thread that read it has ended.
    let busy = engine.stats().compute_seconds;
    let seen = seen.lock().unwrap();
    assert_eq!(seen.batches.iter().sum::<usize>(), 60);
    assert!(seen.overlapping >= 5 && seen.most_under_way == LANES, "{seen:?}");
    assert_eq!(seen.threads, BTreeSet::from(["executor".to_owned()]));
    assert!((busy - seen.waves as f64 * WAVE.as_secs_f64()).abs() < 1e-6, "{busy} s, {seen:?}");
    // Times of tasks that were computed together do not count twice.
    let most = WAVE * (seen.waves as u32 + 1) * 4;
    assert!(by_tasks < most, "{by_tasks:?}, {most:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_arrives_late_joins_waves_under_way() {
    let (engine, seen) = start_slow(Duration::from_millis(200), 1, 1);
    let first = ship(&engine, &[Fate::Computed]);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = ship(&engine, &[Fate::Computed]);
    let mut all = ends(first).await;
    all.extend(ends(second).await);
    assert!(all.iter().all(Result::is_ok));
    settled(engine, &seen, &all).await;
    assert_eq!(seen.lock().unwrap().overlapping, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_at_fault_fails_alone_and_the_others_are_computed() {
    let (engine, seen) = start(4, 8);
    let mut fates = [Fate::Computed; 24];
    (fates[3], fates[4], fates[17]) = (Fate::TooLarge, Fate::TooLarge, Fate::TooLarge);
    let ends = ends(ship(&engine, &fates)).await;
    for (n, kind) in kinds(&ends).into_iter().enumerate() {
        let expected = (fates[n] == Fate::TooLarge).then_some(ErrorKind::TooLarge);
        assert_eq!(kind, expected, "task {n}");
    }
    assert!(!engine.is_draining());
    settled(engine, &seen, &ends).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wave_that_fails_and_a_batch_that_is_refused_take_no_other_along() {
    for bad in [Fate::WaveFails, Fate::BatchRefused] {
        let (engine, seen) = start(1, 1);
        let mut fates = [Fate::Computed; 12];
        fates[5] = bad;
        let ends = ends(ship(&engine, &fates)).await;
        for (n, kind) in kinds(&ends).into_iter().enumerate() {
            assert_eq!(kind, (n == 5).then_some(ErrorKind::Unavailable), "task {n}, {bad:?}");
        }
        assert!(!engine.is_draining());
        settled(engine, &seen, &ends).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_device_takes_no_more_tasks() {
    let (engine, seen) = start(1, 1);
    let mut fates = [Fate::Computed; 20];
    fates[2] = Fate::DeviceDies;
    let ends = ends(ship(&engine, &fates)).await;
    let kinds = kinds(&ends);
    assert_eq!(kinds[..2], [None, None]);
    assert!(kinds[2..].iter().all(|kind| *kind == Some(ErrorKind::Unavailable)), "{kinds:?}");
    let message = &ends[19].as_ref().unwrap_err().message;
    assert!(message.contains("fake:0") && message.contains("the bus is gone"), "{message}");
    assert!(engine.is_draining());
    assert_eq!(engine.lost().unwrap().message, "the bus is gone");
    let refused = engine.admit(&request(0, Fate::Computed).header).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unavailable);
    settled(engine, &seen, &ends).await;
    let begun = seen.lock().unwrap().batches.len();
    assert!(begun <= 2 + LANES, "{begun} batches were begun on a device that is lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_ends_with_its_device() {
    let (engine, seen) = start(1, 1);
    let mut service = serve_engine(engine.clone(), ServiceOptions::default()).await.unwrap();
    let ends = ends(ship(&engine, &[Fate::Computed, Fate::DeviceDies])).await;
    assert_eq!(kinds(&ends), [None, Some(ErrorKind::Unavailable)]);
    let error = service.ended().await.unwrap_err().to_string();
    assert!(error.contains("fake:0") && error.contains("the bus is gone"), "{error}");
    service.shut_down().await.unwrap();
    settled(engine, &seen, &ends).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_ends_every_task_and_the_device_with_them() {
    for bad in [Fate::PanicsAtBegin, Fate::PanicsAtEnd, Fate::PanicsWhenAsked] {
        let (engine, seen) = start(2, 4);
        let mut fates = [Fate::Computed; 20];
        fates[9] = bad;
        let ends = ends(ship(&engine, &fates)).await;
        let error = ends[9].as_ref().unwrap_err();
        assert!(error.kind == ErrorKind::Internal && error.message.contains("panicked"), "{error}");
        assert!(ends[19].is_err() && engine.is_draining());
        settled(engine, &seen, &ends).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_does_not_answer_is_lost() {
    let (engine, seen) = start(1, 1);
    let mut fates = [Fate::Computed; 12];
    fates[4] = Fate::Hangs;
    let ends = ends(ship(&engine, &fates)).await;
    for (n, kind) in kinds(&ends).into_iter().enumerate() {
        assert_eq!(kind, (n >= 4).then_some(ErrorKind::Unavailable), "task {n}");
    }
    assert!(engine.lost().unwrap().message.contains("not answered"), "{:?}", engine.lost());
    settled(engine, &seen, &ends).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_the_device_forgets_ends_too() {
    let (engine, seen) = start(2, 4);
    let fates = [Fate::Computed, Fate::Forgotten, Fate::Computed, Fate::Computed];
    let ends = ends(ship(&engine, &fates)).await;
    assert_eq!(kinds(&ends), [None, Some(ErrorKind::Internal), None, None]);
    settled(engine, &seen, &ends).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_ends_the_thread_once_tasks_in_hand_are_computed() {
    let (engine, seen) = start(1, 2);
    let pending = ship(&engine, &[Fate::Computed; 9]);
    while engine.tasks() < 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let held = engine.tasks();
    engine.close();
    let ends = ends(pending).await;
    assert!(ends.iter().filter(|end| end.is_ok()).count() >= held.min(4));
    let limit = Instant::now() + Duration::from_secs(10);
    while !seen.lock().unwrap().closed {
        assert!(Instant::now() < limit, "the thread runs on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_device_that_cannot_be_opened_is_an_error() {
    let message = || ServerError::Kernel("no abacus".to_owned());
    let error = Engine::start_on(move || Err(message()), 1, 1).unwrap_err();
    assert!(error.to_string().contains("no abacus"), "{error}");
    let error = Engine::start_on(|| panic!("while it opens"), 1, 1).unwrap_err();
    assert!(error.to_string().contains("panicked"), "{error}");
}
