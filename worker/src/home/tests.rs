use outboard_attention::{DocumentId, Span};

use super::*;
use crate::PackedDocument;

const DOCUMENT: DocumentId = DocumentId { rank: 1, index: 0 };

fn geometry() -> HeadGeometry {
    HeadGeometry::standard(2, 2, 4).unwrap()
}

fn layer() -> LayerRef {
    LayerRef { job: "job".to_owned(), step: 5, layer: 1, tick: 0 }
}

/// A call of a rank that holds the first ten tokens of twenty, whose keys are `value`.
fn call(value: f32) -> (LayerCall, Qkv) {
    let packed = PackedDocument { id: DOCUMENT, rows: Span::to(10), first_token: 0, length: 20 };
    let call = LayerCall { step: 5, layer: 1, tick: 0, geometry: geometry(), documents: [packed].into() };
    let tensor = || Elements::from(vec![value; 10 * 2 * 4]);
    (call, Qkv { q: tensor(), k: tensor(), v: tensor() })
}

/// A home that awaits, of one group, a task's share of keys [0, 6) and another's of [0, 8).
fn store() -> HomeStore {
    let store = HomeStore::default();
    store.begin(Member { job: "job".to_owned(), rank: 0, geometry: geometry() });
    let share = Share {
        document: DOCUMENT,
        kv_heads: Span::to(1),
        run: Span::to(10),
        tokens: Span::to(8),
        owner: 1,
        tasks: BTreeMap::from([(0, Span::to(6)), (1, Span::to(8))]),
    };
    store.expect(5, Shares::from([(0, BTreeMap::from([((3, 0), share)]))]));
    store
}

fn gradient(position: u32, tokens: usize, summed: u32) -> KeyGradient {
    let range =
        KeyRange { layer: layer(), document: DOCUMENT, tokens: Span::to(tokens), kv_heads: Span::to(1) };
    let header = GradientHeader { range, group: 3, position, summed };
    let values = || vec![position as f32 + 10.0 * summed as f32; tokens * 4];
    KeyGradient { header, dk: values(), dv: values() }
}

/// What has come after these deliveries: positions, and how many tasks each is the sum of.
async fn delivered(gradients: &[KeyGradient]) -> Result<Vec<(u32, u32)>, TaskError> {
    let store = store();
    for gradient in gradients {
        store.expected(&gradient.header)?;
        store.take_gradient(gradient.clone())?;
    }
    let delivered = store.delivered(&call(0.0).0, Duration::from_millis(20)).await?;
    Ok(delivered.iter().map(|g| (g.header.position, g.header.summed)).collect())
}

#[tokio::test]
async fn a_group_comes_in_parts_or_as_one_sum() {
    let (a, b, sum) = (gradient(0, 6, 0), gradient(1, 8, 0), gradient(0, 8, 2));
    let check = async |gradients: &[&KeyGradient], expected: &[(u32, u32)]| {
        let gradients: Vec<_> = gradients.iter().map(|g| (*g).clone()).collect();
        assert_eq!(delivered(&gradients).await.unwrap(), expected);
    };
    check(&[&b, &a], &[(0, 0), (1, 0)]).await;
    check(&[&a, &a, &b, &a], &[(0, 0), (1, 0)]).await;
    check(&[&sum], &[(0, 2)]).await;
    // A server that delivered the sum here and not to another home: its tasks are sent again, and come once more.
    check(&[&sum, &a, &b], &[(0, 2)]).await;
    // And the other way round: the sum of a server that was given up comes late.
    check(&[&a, &sum], &[(0, 2)]).await;
    check(&[&a, &b, &sum], &[(0, 2)]).await;
}

#[tokio::test]
async fn what_is_missing_or_was_not_planned_is_named() {
    let check = async |gradients: &[KeyGradient], kind: ErrorKind, words: &str| {
        let error = delivered(gradients).await.unwrap_err();
        assert!(error.kind == kind && error.message.contains(words), "{error:?} does not say {words}");
    };
    check(&[gradient(0, 6, 0)], ErrorKind::DeadlineExceeded, "1 shares").await;
    check(&[], ErrorKind::DeadlineExceeded, "queries of rank 1").await;
    // The sum of some tasks would pass for that of all.
    check(&[gradient(0, 8, 1)], ErrorKind::Invalid, "sum of 1 tasks").await;
    check(&[gradient(0, 6, 2)], ErrorKind::Invalid, "sum of 2 tasks").await;
    check(&[gradient(2, 6, 0)], ErrorKind::Invalid, "share of task 2").await;
    check(&[gradient(0, 7, 0)], ErrorKind::Invalid, "keys [0, 7)").await;
    let mut short = gradient(0, 6, 0);
    short.dv.pop();
    check(&[short], ErrorKind::Invalid, "24 and 23 elements").await;
    let mut other = gradient(0, 6, 0);
    other.header.range.layer.step = 6;
    check(&[other], ErrorKind::Busy, "no plan of step 6").await;
}

#[tokio::test]
async fn gradients_are_taken_once_and_late_ones_are_dropped() {
    let (store, (call, _)) = (store(), call(0.0));
    let limit = Duration::from_millis(20);
    store.take_gradient(gradient(0, 8, 2)).unwrap();
    assert_eq!(store.delivered(&call, limit).await.unwrap().len(), 1);
    store.take_gradient(gradient(0, 6, 0)).unwrap();
    let error = store.delivered(&call, limit).await.unwrap_err();
    assert!(error.kind == ErrorKind::Invalid && error.message.contains("once a step"), "{error}");
    store.finish(5);
    let error = store.take_gradient(gradient(0, 6, 0)).unwrap_err();
    assert!(error.kind == ErrorKind::NotFound && error.message.contains("has finished step 5"), "{error}");
    let error = store.delivered(&call, limit).await.unwrap_err();
    assert!(error.message.contains("the step is over"), "{error}");
}

#[tokio::test]
async fn a_layer_has_one_set_of_keys() {
    let store = store();
    let range =
        KeyRange { layer: layer(), document: DOCUMENT, tokens: Span::at(2, 3), kv_heads: Span::at(1, 1) };
    assert_eq!(store.keys(&range).unwrap_err().kind, ErrorKind::Busy);
    let late = store.await_keys(layer(), Duration::from_millis(20)).await.unwrap_err();
    assert!(late.kind == ErrorKind::DeadlineExceeded && late.message.contains("layer 1"), "{late}");
    let (call_of_layer, qkv) = call(1.0);
    store.publish(&call_of_layer, &qkv).unwrap();
    store.await_keys(layer(), Duration::ZERO).await.unwrap();
    let [k, v] = store.keys(&range).unwrap();
    assert_eq!((k.tokens(), k.heads(), v.tokens(), v.heads()), (Span::at(2, 3), 1, Span::at(2, 3), 1));
    store.publish(&call_of_layer, &call(1.0).1).unwrap();
    let error = store.publish(&call_of_layer, &call(2.0).1).unwrap_err();
    assert!(error.message.contains("other keys"), "{error}");
    for (tokens, heads) in [(Span::at(8, 3), Span::at(1, 1)), (Span::at(2, 3), Span::at(1, 2))] {
        let outside = KeyRange { tokens, kv_heads: heads, ..range.clone() };
        assert_eq!(store.keys(&outside).unwrap_err().kind, ErrorKind::Invalid);
    }
    store.close("it has left");
    assert_eq!(store.keys(&range).unwrap_err().kind, ErrorKind::Aborted);
    assert!(store.await_keys(layer(), Duration::from_secs(60)).await.is_err());
}
