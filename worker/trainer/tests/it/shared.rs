//! Core attention of documents that ranks share, by ranks that are threads and tell each other everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use outboard_attention::{DocumentId, Elements, Span};
use outboard_worker::{
    Attended, CoreAttention, LayerCall, OutputGradient, PackedDocument, Qkv, QkvGradient, WorkerError,
};

use crate::support::NaiveAttention;

/// One rank's rows of several tensors, in one call.
struct Told {
    call: (u64, u32, bool),
    documents: Arc<[PackedDocument]>,
    tensors: Vec<Rows>,
}

/// Rows of some width.
#[derive(Clone)]
struct Rows {
    width: usize,
    values: Vec<f32>,
}

/// A line from each rank to each. A rank that ends, however, ends the others' waiting.
struct Lines {
    to: Vec<Sender<Arc<Told>>>,
    from: Vec<Receiver<Arc<Told>>>,
}

/// One rank's end. All ranks must call the same layers in the same order.
pub(crate) struct SharedAttention(Mutex<Lines>);

/// The documents that a rank holds tokens of, whole, and where each begins.
struct Whole {
    documents: Arc<[PackedDocument]>,
    first_row: BTreeMap<DocumentId, usize>,
    tensors: Vec<Rows>,
}

impl SharedAttention {
    /// Ends for as many ranks.
    pub(crate) fn of(ranks: usize) -> Vec<SharedAttention> {
        let mut ends: Vec<Lines> = (0..ranks).map(|_| Lines { to: vec![], from: vec![] }).collect();
        for receiver in 0..ranks {
            for sender in 0..ranks {
                let (to, from) = channel();
                ends[sender].to.push(to);
                ends[receiver].from.push(from);
            }
        }
        ends.into_iter().map(|lines| SharedAttention(Mutex::new(lines))).collect()
    }

    /// Tells the other ranks of this one's rows, and puts together whole documents of what they tell.
    fn share(&self, call: &LayerCall, backward: bool, tensors: Vec<Rows>) -> Whole {
        let about = (call.step, call.layer, backward);
        let mine = Arc::new(Told { call: about, documents: call.documents.clone(), tensors });
        let lines = self.0.lock().unwrap();
        lines.to.iter().for_each(|to| to.send(mine.clone()).unwrap());
        let all: Vec<Arc<Told>> = lines.from.iter().map(|from| from.recv().unwrap()).collect();
        assert!(all.iter().all(|told| told.call == about), "ranks call different layers");
        Whole::of(&mine, &all)
    }
}

impl Whole {
    fn of(mine: &Told, all: &[Arc<Told>]) -> Whole {
        let lengths: BTreeSet<_> = mine.documents.iter().map(|d| (d.id, d.length)).collect();
        let (mut documents, mut first_row, mut rows) = (Vec::new(), BTreeMap::new(), 0);
        for (id, length) in lengths {
            documents.push(PackedDocument::whole(id, Span::at(rows, length)));
            first_row.insert(id, rows);
            rows += length;
        }
        let empty = |tensor: &Rows| Rows { width: tensor.width, values: vec![f32::NAN; rows * tensor.width] };
        let mut whole = Whole {
            documents: documents.into(),
            first_row,
            tensors: mine.tensors.iter().map(empty).collect(),
        };
        for told in all {
            for document in told.documents.iter() {
                let Some(first_row) = whole.first_row.get(&document.id) else { continue };
                let at = first_row + document.first_token;
                for (into, from) in whole.tensors.iter_mut().zip(&told.tensors) {
                    into.put(at, from.rows(document.rows));
                }
            }
        }
        assert!(whole.tensors.iter().all(|t| t.values.iter().all(|v| !v.is_nan())), "nobody holds some rows");
        whole
    }

    fn call(&self, call: &LayerCall) -> LayerCall {
        LayerCall { documents: self.documents.clone(), ..call.clone() }
    }

    fn elements(&self, call: &LayerCall, tensor: usize) -> Elements {
        Elements::rounded(call.geometry.dtype(), self.tensors[tensor].values.iter().copied())
    }

    fn qkv(&self, call: &LayerCall) -> Qkv {
        let [q, k, v] = [0, 1, 2].map(|tensor| self.elements(call, tensor));
        Qkv { q, k, v }
    }

    /// Of a tensor of all rows, those that the call has.
    fn own(&self, call: &LayerCall, width: usize, values: Vec<f32>) -> Vec<f32> {
        let whole = Rows { width, values };
        let rows = |d: &PackedDocument| Span::at(self.first_row[&d.id] + d.first_token, d.rows.len());
        call.documents.iter().flat_map(|d| whole.rows(rows(d)).to_vec()).collect()
    }
}

impl Rows {
    fn of(width: usize, elements: &Elements) -> Rows {
        Rows { width, values: elements.values().into_owned() }
    }

    fn rows(&self, rows: Span) -> &[f32] {
        &self.values[rows.start() * self.width..rows.end() * self.width]
    }

    fn put(&mut self, row: usize, values: &[f32]) {
        self.values[row * self.width..][..values.len()].copy_from_slice(values);
    }
}

/// Elements of a row of queries and of one of keys, and its heads.
fn widths(call: &LayerCall) -> (usize, usize, usize) {
    let g = call.geometry;
    (g.q_heads() * g.head_dim(), g.kv_heads() * g.head_dim(), g.q_heads())
}

fn rows_of(call: &LayerCall, qkv: &Qkv) -> Vec<Rows> {
    let (row, key, _) = widths(call);
    vec![Rows::of(row, &qkv.q), Rows::of(key, &qkv.k), Rows::of(key, &qkv.v)]
}

impl CoreAttention for SharedAttention {
    fn forward(&self, call: &LayerCall, qkv: &Qkv) -> Result<Attended, WorkerError> {
        let (row, _, heads) = widths(call);
        let whole = self.share(call, false, rows_of(call, qkv));
        let Attended { o, lse } = NaiveAttention.forward(&whole.call(call), &whole.qkv(call))?;
        let lse = whole.own(call, heads, lse.to_vec());
        Ok(Attended { o: whole.own(call, row, o), lse: Arc::new(lse) })
    }

    fn backward(
        &self,
        call: &LayerCall,
        qkv: &Qkv,
        grad: &OutputGradient,
    ) -> Result<QkvGradient, WorkerError> {
        let (row, key, heads) = widths(call);
        let statistic = |values: &Arc<Vec<f32>>| Rows { width: heads, values: values.to_vec() };
        let mut tensors = rows_of(call, qkv);
        tensors.extend([Rows::of(row, &grad.d_o), statistic(&grad.lse), statistic(&grad.d)]);
        let whole = self.share(call, true, tensors);
        let [lse, d] = [4, 5].map(|tensor| Arc::new(whole.tensors[tensor].values.clone()));
        let gradient = OutputGradient { d_o: whole.elements(call, 3), lse, d };
        let QkvGradient { dq, dk, dv } =
            NaiveAttention.backward(&whole.call(call), &whole.qkv(call), &gradient)?;
        Ok(QkvGradient {
            dq: whole.own(call, row, dq),
            dk: whole.own(call, key, dk),
            dv: whole.own(call, key, dv),
        })
    }
}
