//! The plans of a device: built when first needed, in the background where a larger one can stand in, and kept on disk.

mod bounds;
mod engine;
mod files;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use outboard_attention::Direction;

pub(crate) use bounds::MAX_SEQUENCES;
pub(crate) use engine::{Engine, Plan, Target, describe};
use files::PlanFiles;

use crate::CudaError;
use crate::batch::Shape;
use crate::cudnn::{Cudnn, Handle};
use crate::graph::{self, Bounds, CallGeometry, GraphKey};

/// The bounds at which the heuristics are asked.
const ASKED: Bounds = Bounds { sequences: 16, rows: 4096, keys: 4096 };

/// Plans that wait to be built, at most. Those beyond are asked for again by the next call.
const BACKLOG: usize = 32;

/// What plans are built for, and where they are kept.
#[derive(Clone, Debug)]
pub(crate) struct PlanConfig {
    /// Names the kind of device, for the files.
    pub(crate) device: String,
    /// Its compute capability.
    pub(crate) compute: (i32, i32),
    /// Where plans are kept between runs, if they are.
    pub(crate) folder: Option<PathBuf>,
    /// Whether backward may add in an order that is not fixed.
    pub(crate) deterministic: bool,
}

/// The plans of a device.
#[derive(Debug)]
pub(crate) struct Plans {
    cudnn: Arc<Cudnn>,
    config: PlanConfig,
    files: Option<PlanFiles>,
    engines: Mutex<HashMap<(Direction, Shape, CallGeometry), Engine>>,
    ready: Mutex<HashMap<GraphKey, Arc<Plan>>>,
}

impl Plans {
    pub(crate) fn new(cudnn: &Arc<Cudnn>, mut config: PlanConfig) -> Plans {
        config.deterministic &= cudnn.can_order(config.compute);
        let files = config.folder.clone().map(PlanFiles::new);
        Plans { cudnn: Arc::clone(cudnn), config, files, engines: Mutex::default(), ready: Mutex::default() }
    }

    /// Whether backward sums in a fixed order.
    pub(crate) fn is_deterministic(&self) -> bool {
        self.config.deterministic
    }

    /// The engine that computes every call of this kind.
    pub(crate) fn engine(
        &self,
        direction: Direction,
        shape: Shape,
        geometry: CallGeometry,
        target: Target<'_>,
    ) -> Result<Engine, CudaError> {
        // Where tensors lie must not decide how they are computed.
        let geometry = CallGeometry { heads: 1, ..geometry };
        if let Some(engine) = lock(&self.engines).get(&(direction, shape, geometry)) {
            return Ok(engine.clone());
        }
        let asked = GraphKey { direction, shape, geometry, bounds: ASKED };
        let name = self.name(&asked, None);
        let stored = self.files.as_ref().and_then(|files| files.read(&name));
        // A kernel that is not what its name says would be worse than asking anew.
        let sound = |engine: &Engine| {
            engine.deterministic == (direction == Direction::Forward || self.config.deterministic)
        };
        let engine = match stored.filter(|(engine, _)| sound(engine)) {
            Some((engine, _)) => engine,
            None => {
                let graph = graph::build(&self.cudnn, &asked, target.handle())?;
                let deterministic = self.config.deterministic;
                let engine = engine::choose(&self.cudnn, &graph, direction, deterministic, target)?;
                if let Some(files) = &self.files {
                    files.write(&name, &engine, String::new());
                }
                engine
            }
        };
        tracing::debug!(%name, ?engine, "chose an engine");
        lock(&self.engines).insert((direction, shape, geometry), engine.clone());
        Ok(engine)
    }

    /// A plan that can compute `call`, and, when it is a larger one that stands in, the key of the right one.
    pub(crate) fn get(
        &self,
        call: GraphKey,
        target: Target<'_>,
    ) -> Result<(Arc<Plan>, Option<GraphKey>), CudaError> {
        let key = GraphKey { bounds: bounds::for_call(call.direction, call.bounds), ..call };
        let stand_in = {
            let ready = lock(&self.ready);
            if let Some(plan) = ready.get(&key) {
                return Ok((Arc::clone(plan), None));
            }
            let fits = |other: &GraphKey| {
                GraphKey { bounds: call.bounds, ..*other } == call
                    && bounds::covers(other.bounds, call.bounds)
            };
            let smallest =
                ready.iter().filter(|(other, _)| fits(other)).min_by_key(|(other, _)| other.bounds);
            smallest.map(|(_, plan)| Arc::clone(plan))
        };
        match stand_in {
            Some(plan) => Ok((plan, Some(key))),
            None => Ok((self.build(key, target)?, None)),
        }
    }

    /// Builds or restores the plan of exactly this key.
    pub(crate) fn build(&self, key: GraphKey, target: Target<'_>) -> Result<Arc<Plan>, CudaError> {
        if let Some(plan) = lock(&self.ready).get(&key) {
            return Ok(Arc::clone(plan));
        }
        let engine = self.engine(key.direction, key.shape, key.geometry, target)?;
        let name = self.name(&key, Some(&engine));
        let stored = self.files.as_ref().and_then(|files| files.read(&name));
        let restored = stored.and_then(|(_, json)| {
            match engine::restore(&self.cudnn, &json, key.bounds.sequences, target) {
                Ok(plan) => Some(plan),
                Err(error) => {
                    tracing::warn!(%name, %error, "cuDNN does not take a stored plan; it will be built anew");
                    None
                }
            }
        });
        let plan = match restored {
            Some(plan) => plan,
            None => {
                let graph = graph::build(&self.cudnn, &key, target.handle())?;
                let plan = engine::plan(&self.cudnn, graph, &engine, target)?;
                if let Some(files) = &self.files {
                    files.write(&name, &engine, plan.json()?);
                }
                plan
            }
        };
        let plan = Arc::new(plan);
        lock(&self.ready).insert(key, Arc::clone(&plan));
        Ok(plan)
    }

    /// Everything that an engine choice, or a plan by it, depends on.
    fn name(&self, key: &GraphKey, engine: Option<&Engine>) -> String {
        let GraphKey { direction, shape, geometry, bounds } = key;
        let CallGeometry { dtype, group, dim, heads } = geometry;
        let Bounds { sequences, rows, keys } = bounds;
        let shape = match shape {
            Shape::Full => "full",
            Shape::Triangle => "triangle",
            Shape::Causal => "causal",
        };
        let wanted = if self.config.deterministic { "deterministic" } else { "fastest" };
        let by = match engine {
            Some(Engine { index, knobs, .. }) => {
                let knobs: Vec<String> =
                    knobs.iter().map(|(knob, value)| format!("{knob}={value}")).collect();
                format!("engine {index} {}", knobs.join(" "))
            }
            None => format!("choice {wanted}"),
        };
        format!(
            "cudnn {} {} {direction} {shape} {dtype} h{heads} g{group} d{dim} b{sequences} q{rows} k{keys} {by}",
            self.cudnn.version(),
            self.config.device,
        )
    }
}

/// What the names of stored plans say of a device, from its properties as cuDNN writes them, and its compute capability.
/// Plans hold machine code, and depend on the number of processors.
pub(crate) fn device_kind(properties: &str) -> (String, (i32, i32)) {
    let properties: serde_json::Value = serde_json::from_str(properties).unwrap_or_default();
    let number = |name: &str| properties.get(name).and_then(serde_json::Value::as_i64).unwrap_or(0) as i32;
    let name = properties.get("deviceName").and_then(serde_json::Value::as_str).unwrap_or("unknown");
    let compute = (number("deviceVer") / 100, number("deviceVer") / 10 % 10);
    let (major, minor) = compute;
    (format!("{name} sm{major}{minor} {} processors", number("multiProcessorCount")), compute)
}

/// Builds plans on a thread of its own, which ends, with the plan in hand, when this is dropped.
#[derive(Debug)]
pub(crate) struct Background {
    wanted: Option<SyncSender<GraphKey>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts the thread. `enter` makes a handle there, in the device's context, which it returns to be kept as long.
    pub(crate) fn start<C>(
        plans: Arc<Plans>,
        enter: impl FnOnce() -> Result<(Handle, C), CudaError> + Send + 'static,
    ) -> std::io::Result<Background> {
        let (wanted, keys) = sync_channel(BACKLOG);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || build_all(plans, enter, &keys, &stopped);
        let thread = std::thread::Builder::new().name("plans".into()).spawn(run)?;
        Ok(Background { wanted: Some(wanted), stop, thread: Some(thread) })
    }

    /// Asks for a plan. A full backlog is no loss: the next call asks again.
    pub(crate) fn want(&self, key: GraphKey) {
        if let Some(wanted) = &self.wanted {
            let _ = wanted.try_send(key);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wanted = None;
        if let Some(thread) = self.thread.take() {
            // It ends by itself; that it panicked was reported when it did.
            let _ = thread.join();
        }
    }
}

fn build_all<C>(
    plans: Arc<Plans>,
    enter: impl FnOnce() -> Result<(Handle, C), CudaError>,
    keys: &Receiver<GraphKey>,
    stop: &AtomicBool,
) {
    let (handle, context) = match enter() {
        Ok(entered) => entered,
        Err(error) => {
            tracing::warn!(%error, "cannot build plans in the background; larger ones will stand in");
            return;
        }
    };
    let mut failed = HashSet::new();
    while let Ok(key) = keys.recv() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        if failed.contains(&key) {
            continue;
        }
        if let Err(error) = plans.build(key, Target::Device(&handle)) {
            tracing::warn!(?key, %error, "cannot build a plan in the background; a larger one stands in");
            failed.insert(key);
        }
    }
    // Plans and handle need the context to go.
    drop(plans);
    drop(handle);
    drop(context);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The maps are whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
