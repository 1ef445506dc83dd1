//! Homes that hold random keys and record what is delivered to them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use outboard_attention::{DocumentId, Elements, HeadGeometry, Span, TensorLayout, TensorSlice};
use outboard_proto::{ErrorKind, GradientHeader, KeyRange, LayerRef, TaskError};
use outboard_transport::grpc::{LinkConfig, serve_home};
use outboard_transport::{HomeHandler, Homes, KeyGradient};

use super::{Server, WireFault, WireHome};

/// How the handler of a home misbehaves.
#[derive(Clone, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    Refuses(TaskError),
    RefusesGradients(TaskError),
    /// Gives out one token less than was asked for.
    Short,
}

/// The layer, the tokens, the kv heads, the group, the position, and how many tasks were added up.
type ShareName = (LayerRef, Span, Span, u32, u32, u32);

#[derive(Default)]
pub struct TestHome {
    pub fault: Mutex<Fault>,
    /// By step.
    documents: Mutex<HashMap<u64, Held>>,
    expected: Mutex<BTreeSet<ShareName>>,
    taken: Mutex<BTreeMap<ShareName, KeyGradient>>,
    /// Deliveries, those of shares taken already included.
    pub deliveries: AtomicU64,
    pub received: AtomicU64,
    pub sent: AtomicU64,
}

/// What of a document it holds.
pub struct Held {
    pub document: DocumentId,
    pub keys: [Elements; 2],
    pub geometry: HeadGeometry,
    pub tokens: Vec<Span>,
}

fn name_of(header: &GradientHeader) -> ShareName {
    let GradientHeader { range, group, position, summed } = header;
    (range.layer.clone(), range.tokens, range.kv_heads, *group, *position, *summed)
}

impl TestHome {
    pub fn hold(&self, step: u64, held: Held) {
        self.documents.lock().unwrap().insert(step, held);
    }

    pub fn expect(&self, header: &GradientHeader) {
        self.expected.lock().unwrap().insert(name_of(header));
    }

    pub fn taken(&self, header: &GradientHeader) -> Option<KeyGradient> {
        self.taken.lock().unwrap().get(&name_of(header)).cloned()
    }

    /// How many shares of a step were taken.
    pub fn count_taken(&self, step: u64) -> usize {
        self.taken.lock().unwrap().keys().filter(|(layer, ..)| layer.step == step).count()
    }

    fn slices(&self, range: &KeyRange) -> Result<[TensorSlice; 2], TaskError> {
        let documents = self.documents.lock().unwrap();
        let unknown = || TaskError::new(ErrorKind::NotFound, format!("{range}: not held here"));
        let Held { document, keys, geometry, tokens } =
            documents.get(&range.layer.step).ok_or_else(unknown)?;
        if *document != range.document || !tokens.iter().any(|held| held.covers(range.tokens)) {
            return Err(unknown());
        }
        let slice = |elements: &Elements, dim: usize| {
            let stride = geometry.kv_heads() * dim;
            let offset = range.tokens.start() * stride + range.kv_heads.start() * dim;
            let heads = range.kv_heads.len();
            let layout = TensorLayout { offset, stride, tokens: range.tokens, heads, dim };
            TensorSlice::new("keys", elements.clone(), layout).map_err(TaskError::from)
        };
        Ok([slice(&keys[0], geometry.head_dim())?, slice(&keys[1], geometry.v_head_dim())?])
    }

    fn fault(&self) -> Fault {
        self.fault.lock().unwrap().clone()
    }
}

impl HomeHandler for TestHome {
    fn await_keys(&self, layer: LayerRef, limit: Duration) -> BoxFuture<'_, Result<(), TaskError>> {
        let held = self.documents.lock().unwrap().contains_key(&layer.step);
        let wait = async move {
            if held {
                return Ok(());
            }
            tokio::time::sleep(limit).await;
            Err(TaskError::deadline(&layer.to_string(), limit))
        };
        wait.boxed()
    }

    fn keys(&self, range: &KeyRange) -> Result<[TensorSlice; 2], TaskError> {
        match self.fault() {
            Fault::Refuses(error) => Err(error),
            Fault::Short => self.slices(range).map(|slices| {
                let fewer = Span::new(range.tokens.start(), range.tokens.end() - 1).unwrap();
                slices.map(|slice| slice.with_tokens(fewer).unwrap())
            }),
            _ => self.slices(range),
        }
    }

    fn expected(&self, header: &GradientHeader) -> Result<[usize; 2], TaskError> {
        if let Fault::RefusesGradients(error) = self.fault() {
            return Err(error);
        }
        if !self.expected.lock().unwrap().contains(&name_of(header)) {
            return Err(TaskError::invalid(format!("{}: not awaited here", header.range)));
        }
        let documents = self.documents.lock().unwrap();
        let Held { geometry, .. } = &documents[&header.range.layer.step];
        let heads = header.range.kv_heads.len();
        Ok([heads * geometry.head_dim(), heads * geometry.v_head_dim()])
    }

    fn take_gradient(&self, gradient: KeyGradient) -> Result<(), TaskError> {
        let sizes = self.expected(&gradient.header)?.map(|row| row * gradient.header.range.tokens.len());
        if sizes != [gradient.dk.len(), gradient.dv.len()] {
            return Err(TaskError::invalid("a share of another size"));
        }
        self.deliveries.fetch_add(1, Ordering::SeqCst);
        self.taken.lock().unwrap().entry(name_of(&gradient.header)).or_insert(gradient);
        Ok(())
    }

    fn count_bytes(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Ordering::SeqCst);
        self.sent.fetch_add(sent, Ordering::SeqCst);
    }
}

/// What kind of home is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spec {
    /// In the server's process, by pointer: nobody listens at its address.
    Beside,
    Real,
    /// Made by hand.
    Wire(WireFault),
    /// Nobody listens.
    Gone,
}

pub struct Place {
    pub home: Arc<TestHome>,
    pub rank: u32,
    pub address: String,
    pub spec: Spec,
    pub server: Option<Server>,
    pub wire: Option<Arc<WireHome>>,
}

impl Place {
    pub async fn start(rank: u32, spec: Spec) -> Place {
        let home = Arc::new(TestHome::default());
        let mut place = Place { home, rank, address: String::new(), spec, server: None, wire: None };
        place.listen("127.0.0.1:0").await;
        place
    }

    pub async fn listen(&mut self, address: &str) {
        let home = Arc::clone(&self.home);
        let (server, wire) = match self.spec {
            Spec::Beside => {
                self.address = format!("beside:{}", self.rank);
                return;
            }
            Spec::Gone | Spec::Real => {
                let serving = |listener, stop| async move {
                    serve_home(listener, home, quick(), stop).await.unwrap();
                };
                (Server::of(address, serving).await, None)
            }
            Spec::Wire(fault) => {
                let wire = Arc::new(WireHome::new(home, fault));
                let serving = Arc::clone(&wire);
                (Server::of(address, |listener, _| serving.serve(listener)).await, Some(wire))
            }
        };
        self.address = server.address.to_string();
        if self.spec == Spec::Gone {
            server.kill();
        } else {
            (self.server, self.wire) = (Some(server), wire);
        }
    }

    pub fn kill(&mut self) {
        self.server.take().map(Server::kill);
    }
}

/// Links whose ends are soon found dead.
pub fn quick() -> LinkConfig {
    LinkConfig {
        keep_alive_interval: Duration::from_millis(500),
        keep_alive_timeout: Duration::from_secs(2),
        ..LinkConfig::default()
    }
}

/// The homes of documents.
pub struct Places(pub Vec<Place>);

impl Places {
    pub async fn start(specs: &[Spec]) -> Places {
        let starts = specs.iter().zip(0..).map(|(&spec, n)| Place::start(10 + n, spec));
        Places(futures::future::join_all(starts).await)
    }

    /// The way there.
    pub fn way(&self, link: LinkConfig) -> Homes {
        let beside = self.0.iter().find(|place| place.spec == Spec::Beside);
        let way = beside.map_or_else(Homes::default, |place| {
            Homes::beside(place.address.clone(), Arc::clone(&place.home) as _)
        });
        way.with_link(link)
    }

    pub fn at(&self, address: &str) -> &Place {
        self.0.iter().find(|place| place.address == address).unwrap()
    }

    /// Bytes that went to homes over the network, and that came from there.
    pub fn traffic(&self) -> (u64, u64) {
        let sum = |of: fn(&TestHome) -> &AtomicU64| {
            self.0.iter().map(|place| of(&place.home).load(Ordering::SeqCst)).sum()
        };
        (sum(|home| &home.received), sum(|home| &home.sent))
    }
}
