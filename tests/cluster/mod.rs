//! A whole cluster in one process: a coordinator, attention servers, and ranks on threads, over real sockets.
#![allow(dead_code, unreachable_pub, reason = "a module of test binaries, each of which uses its own part")]

use std::sync::Arc;

use outboard_attention::kernel::{Isa, KernelConfig};
use outboard_attention::{Document, DocumentId, Elements, HeadGeometry, HomeRange, Span};
use outboard_attention_server::{EngineOptions, InPlace, Service, ServiceOptions};
use outboard_transport::TaskHandler;
use outboard_worker::{
    Attended, CoreAttention, JobOptions, LayerCall, LocalAttention, OutputGradient, PackedDocument,
    PoolAttention, Qkv, QkvGradient,
};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// A coordinator and what is needed to reach it.
pub struct Cluster {
    pub runtime: Runtime,
    pub url: String,
}

/// One rank's inputs of one layer, random.
pub struct RankInputs {
    pub call: LayerCall,
    pub qkv: Qkv,
    pub gradient_of_o: Elements,
}

/// O, LSE and the gradients of one layer.
#[derive(Debug, PartialEq)]
pub struct LayerOutput {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

impl Cluster {
    pub fn start() -> Cluster {
        Cluster::start_with(outboard_coordinator::Options::default())
    }

    pub fn start_with(options: outboard_coordinator::Options) -> Cluster {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(outboard_coordinator::serve(listener, options, std::future::pending()));
        Cluster { runtime, url }
    }

    /// A server in the pool; dedicated, or in place with a rank of `job`.
    pub fn server(&self, in_place: Option<(&str, u32)>) -> Service {
        self.server_with(in_place, EngineOptions::default())
    }

    pub fn server_with(&self, in_place: Option<(&str, u32)>, engine: EngineOptions) -> Service {
        let options = ServiceOptions {
            coordinator: Some(self.url.clone()),
            in_place: in_place.map(|(job, rank)| InPlace { job: job.to_owned(), rank }),
            ..ServiceOptions::default()
        };
        self.runtime.block_on(outboard_attention_server::serve(&engine, options)).unwrap()
    }

    /// Joins all ranks of a job, each with its in-place server if it has one.
    pub fn join(
        &self,
        job: &str,
        ranks: u32,
        geometry: HeadGeometry,
        servers: &[Option<&Service>],
    ) -> Vec<PoolAttention> {
        let options = JobOptions::new(self.url.clone(), job.to_owned(), 0, ranks, geometry);
        self.join_with(&options, servers)
    }

    /// The same with these options for all ranks.
    pub fn join_with(&self, options: &JobOptions, servers: &[Option<&Service>]) -> Vec<PoolAttention> {
        let ranks = options.ranks;
        let join = |rank: u32| {
            let options = JobOptions { rank, ..options.clone() };
            let service = servers.get(rank as usize).copied().flatten();
            let handler = service.map(|service| Arc::new(service.engine()) as Arc<dyn TaskHandler>);
            let runtime = self.runtime.handle().clone();
            move || PoolAttention::join(options, runtime, handler, None).unwrap()
        };
        std::thread::scope(|scope| {
            let joining: Vec<_> = (0..ranks).map(|rank| scope.spawn(join(rank))).collect();
            joining.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

/// The documents of a rank, all its own.
pub fn documents(rank: u32, lengths: &[usize]) -> Vec<Document> {
    let document = |(index, &tokens): (usize, &usize)| {
        let id = DocumentId { rank, index: index as u32 };
        Document::new(id, tokens, vec![HomeRange { rank, tokens: Span::to(tokens) }]).unwrap()
    };
    lengths.iter().enumerate().map(document).collect()
}

impl RankInputs {
    pub fn random(step: u64, layer: u32, rank: u32, geometry: HeadGeometry, lengths: &[usize]) -> RankInputs {
        let mut at = 0;
        let packed = lengths.iter().enumerate().map(|(index, &tokens)| {
            let rows = Span::at(at, tokens);
            at += tokens;
            PackedDocument::whole(DocumentId { rank, index: index as u32 }, rows)
        });
        let documents: Vec<_> = packed.collect();
        let mut random =
            Random(0x9e37_79b9_7f4a_7c15 ^ (step << 40) ^ (u64::from(layer) << 20) ^ u64::from(rank) ^ 1);
        let mut fill = |n: usize| Elements::rounded(geometry.dtype(), (0..n).map(|_| random.next()));
        let qkv = Qkv {
            q: fill(at * geometry.q_heads() * geometry.head_dim()),
            k: fill(at * geometry.kv_heads() * geometry.head_dim()),
            v: fill(at * geometry.kv_heads() * geometry.v_head_dim()),
        };
        let gradient_of_o = fill(at * geometry.q_heads() * geometry.v_head_dim());
        let call = LayerCall { step, layer, tick: 0, geometry, documents: documents.into() };
        RankInputs { call, qkv, gradient_of_o }
    }

    /// Forward, then backward from a random gradient.
    pub fn compute(
        &self,
        attention: &dyn CoreAttention,
    ) -> Result<LayerOutput, outboard_worker::WorkerError> {
        let Attended { o, lse } = attention.forward(&self.call, &self.qkv)?;
        let heads = self.call.geometry.q_heads();
        let dim = self.call.geometry.v_head_dim();
        let gradient_of_o = self.gradient_of_o.values();
        let dots = gradient_of_o.chunks(dim).zip(o.chunks(dim));
        let d: Vec<f32> = dots.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect();
        assert_eq!(d.len(), self.call.rows() * heads);
        let gradient = OutputGradient { d_o: self.gradient_of_o.clone(), lse: lse.clone(), d: Arc::new(d) };
        let QkvGradient { dq, dk, dv } = attention.backward(&self.call, &self.qkv, &gradient)?;
        Ok(LayerOutput { o, lse: lse.to_vec(), dq, dk, dv })
    }

    /// The same by this thread alone.
    pub fn compute_locally(&self) -> LayerOutput {
        let config = KernelConfig::new(Isa::detect(), 1);
        self.compute(&LocalAttention::new(config).unwrap()).unwrap()
    }
}

impl LayerOutput {
    /// The largest relative distance (in Frobenius norm) of any tensor from that of `other`.
    pub fn distance(&self, other: &LayerOutput) -> f64 {
        let pairs = [
            (&self.o, &other.o),
            (&self.lse, &other.lse),
            (&self.dq, &other.dq),
            (&self.dk, &other.dk),
            (&self.dv, &other.dv),
        ];
        let distance = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            assert_eq!(a.len(), b.len());
            let square = |x: f64| x * x;
            let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
            let size: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
            (apart / size.max(1e-30)).sqrt()
        };
        // NaN must not pass as small.
        pairs.map(distance).into_iter().fold(0.0, |most, d| if d <= most { most } else { d })
    }

    pub fn bits(&self) -> Vec<u32> {
        [&self.o, &self.lse, &self.dq, &self.dk, &self.dv]
            .into_iter()
            .flatten()
            .map(|x| x.to_bits())
            .collect()
    }
}

/// Small and seeded: what is computed must not differ from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
