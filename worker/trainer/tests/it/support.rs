//! What tests share.

use std::borrow::Cow;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use outboard_attention::{DocumentId, Elements, Span};
use outboard_trainer::{Exchange, ExchangeConfig, ModelConfig, PackedBatch, Parameter};
use outboard_worker::{
    Attended, CoreAttention, LayerCall, OutputGradient, PackedDocument, Qkv, QkvGradient, WorkerError,
};

/// A model small enough for finite differences, no two of whose widths are equal.
pub(crate) fn small_model() -> ModelConfig {
    ModelConfig {
        layers: 2,
        dim: 24,
        q_heads: 4,
        kv_heads: 2,
        head_dim: 8,
        ffn_dim: 20,
        ..ModelConfig::default()
    }
}

/// Documents of the given lengths with arbitrary bytes.
pub(crate) fn batch(step: u64, rank: u32, lengths: &[usize]) -> PackedBatch {
    let mut at = 0;
    let mut documents = Vec::new();
    for (index, &tokens) in lengths.iter().enumerate() {
        let id = DocumentId { rank, index: index as u32 };
        documents.push(PackedDocument::whole(id, Span::at(at, tokens)));
        at += tokens;
    }
    let tokens = (0..at).map(|i| ((i * i * 31 + i * 7 + 11 * rank as usize) % 251) as u8).collect();
    PackedBatch::whole(step, documents, tokens)
}

/// Causal attention row by row in f64: slow and plain.
pub(crate) struct NaiveAttention;

/// Calls `visit` with every (document row range, query row, query head, kv head).
fn rows(call: &LayerCall, mut visit: impl FnMut(Span, usize, usize, usize)) {
    for document in call.documents.iter() {
        for row in document.rows.iter() {
            for head in 0..call.geometry.q_heads() {
                visit(document.rows, row, head, head / call.geometry.group());
            }
        }
    }
}

/// A tensor's values, which must be of the call's element type.
fn values<'a>(call: &LayerCall, elements: &'a Elements) -> Cow<'a, [f32]> {
    assert_eq!(elements.dtype(), call.geometry.dtype());
    elements.values()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

impl CoreAttention for NaiveAttention {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        let g = call.geometry;
        let (heads, kv_heads, dim, scale) = (g.q_heads(), g.kv_heads(), g.head_dim(), f64::from(g.scale()));
        let (mut o, mut lse) = (vec![0.0; qkv.q.len()], vec![0.0; qkv.q.len() / dim]);
        let [all_q, all_k, all_v] = [&qkv.q, &qkv.k, &qkv.v].map(|elements| values(call, elements));
        rows(call, |document, row, head, kv_head| {
            let q = &all_q[(row * heads + head) * dim..][..dim];
            let kv_at = |key: usize| (key * kv_heads + kv_head) * dim;
            let keys = document.start()..row + 1;
            let scores: Vec<f64> =
                keys.clone().map(|key| dot(q, &all_k[kv_at(key)..][..dim]) * scale).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            lse[row * heads + head] = log_sum as f32;
            for d in 0..dim {
                let parts = keys.clone().zip(&scores);
                let sum: f64 =
                    parts.map(|(key, s)| (s - log_sum).exp() * f64::from(all_v[kv_at(key) + d])).sum();
                o[(row * heads + head) * dim + d] = sum as f32;
            }
        });
        Ok(Attended { o, lse: Arc::new(lse) })
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        grad: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        let g = call.geometry;
        let (heads, kv_heads, dim, scale) = (g.q_heads(), g.kv_heads(), g.head_dim(), f64::from(g.scale()));
        let mut dq = vec![0.0_f64; qkv.q.len()];
        let (mut dk, mut dv) = (vec![0.0_f64; qkv.k.len()], vec![0.0_f64; qkv.v.len()]);
        let [all_q, all_k, all_v, all_d_o] =
            [&qkv.q, &qkv.k, &qkv.v, &grad.d_o].map(|elements| values(call, elements));
        rows(call, |document, row, head, kv_head| {
            let at = (row * heads + head) * dim;
            let (q, d_o) = (&all_q[at..][..dim], &all_d_o[at..][..dim]);
            let (lse, d) = (f64::from(grad.lse[row * heads + head]), f64::from(grad.d[row * heads + head]));
            for key in document.start()..row + 1 {
                let kv_at = (key * kv_heads + kv_head) * dim;
                let (k, v) = (&all_k[kv_at..][..dim], &all_v[kv_at..][..dim]);
                let p = (dot(q, k) * scale - lse).exp();
                let ds = p * (dot(d_o, v) - d) * scale;
                for i in 0..dim {
                    dq[at + i] += ds * f64::from(k[i]);
                    dk[kv_at + i] += ds * f64::from(q[i]);
                    dv[kv_at + i] += p * f64::from(d_o[i]);
                }
            }
        });
        let narrow = |wide: Vec<f64>| wide.into_iter().map(|x| x as f32).collect();
        Ok(QkvGradient { dq: narrow(dq), dk: narrow(dk), dv: narrow(dv) })
    }
}

pub(crate) fn naive() -> Arc<dyn CoreAttention> {
    Arc::new(NaiveAttention)
}

#[track_caller]
pub(crate) fn assert_close(name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    let difference: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    let (difference, scale) = (norm(&difference), norm(expected));
    assert_eq!(found.len(), expected.len(), "{name}");
    assert!(scale > 1e-6, "{name}: the expected gradient vanishes");
    assert!(difference <= tolerance * scale, "{name}: differs by {difference} of {scale}");
}

pub(crate) fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// A parameter's part of a flat gradient.
pub(crate) fn part<'a>(flat: &'a [f32], parameter: &Parameter) -> &'a [f32] {
    &flat[parameter.offset()..][..parameter.elements()]
}

/// A folder that is removed in the end.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("outboard-trainer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file, making the folders it lies in.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Listeners on free ports and their addresses.
pub(crate) fn listeners(ranks: u32) -> (Vec<TcpListener>, Vec<SocketAddr>) {
    let listeners: Vec<_> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    (listeners, addresses)
}

pub(crate) fn exchange_config(rank: u32, ranks: u32, timeout: Duration) -> ExchangeConfig {
    ExchangeConfig { job: "test".into(), rank, ranks, timeout }
}

/// Runs `body` as every rank of a connected exchange, each on a thread, and gives the results by rank.
pub(crate) fn as_ranks<T: Send>(
    ranks: u32,
    timeout: Duration,
    body: impl Fn(Exchange) -> T + Sync,
) -> Vec<T> {
    let (listeners, addresses) = listeners(ranks);
    thread::scope(|scope| {
        let running: Vec<_> = (0..ranks)
            .zip(&listeners)
            .map(|(rank, listener)| {
                let (addresses, body) = (&addresses, &body);
                scope.spawn(move || {
                    let config = exchange_config(rank, ranks, timeout);
                    body(Exchange::connect(&config, listener, addresses).unwrap())
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
