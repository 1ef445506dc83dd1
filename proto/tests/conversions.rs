//! Domain <-> wire: what is valid comes back as it went, and what is not is refused by name, never by a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use outboard_attention::{
    BandSlice, DType, Direction, Document, DocumentId, HeadGeometry, HeadShape, HomeRange, Mask, MaskPart,
    PlannedTask, Span, Task,
};
use outboard_proto::{
    AssignedTask, ErrorKind, MAX_NAME_BYTES, MAX_SLICES, RetryHint, TaskError, TaskHeader, TensorKind,
    TensorRef, WireTask, check_protocol_version, failure_of, v1,
};
use proptest::prelude::*;
use prost::Message;
use tonic::{Code, Status};

fn span(max: usize) -> impl Strategy<Value = Span> {
    (0..max, 1..=max).prop_map(move |(start, len)| Span::new(start, (start + len).min(max)).unwrap())
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::Bf16), Just(DType::F16)]
}

fn geometry() -> impl Strategy<Value = HeadGeometry> {
    let softcap = proptest::option::of(1e-3..1e3f32);
    (1..9usize, 1..9usize, 1..=256usize, 1..=256usize, 1e-6..1e3f32, dtype(), softcap).prop_map(
        |(kv_heads, group, head_dim, v_head_dim, scale, dtype, softcap)| {
            let shape = HeadShape {
                q_heads: kv_heads * group,
                kv_heads,
                head_dim,
                v_head_dim,
                scale,
                dtype,
                softcap,
            };
            HeadGeometry::try_from(shape).unwrap()
        },
    )
}

/// Slices made disjoint by giving each a row range of its own.
fn mask(tokens: usize, kv_heads: usize) -> impl Strategy<Value = Mask> {
    let band = prop_oneof![
        Just((None, Some(0))),
        Just((None, None)),
        Just((Some(-17), Some(3))),
        Just((Some(-5), None))
    ];
    prop::collection::vec((span(kv_heads), span(tokens), band), 1..6).prop_map(move |parts| {
        let rows = tokens / parts.len();
        let part = |(n, (kv_heads, kv, (lo, hi)))| {
            let slice = BandSlice::new(Span::at(n * rows, rows), kv, lo, hi).unwrap();
            MaskPart { kv_heads, slice }
        };
        Mask::new(parts.into_iter().enumerate().map(part).collect()).unwrap()
    })
}

fn tensor() -> impl Strategy<Value = TensorRef> {
    use TensorKind::*;
    let kind = prop::sample::select(vec![Q, K, V, O, Lse, DO, D, DQ, DK, DV]);
    (any::<u64>(), kind, span(1000), any::<bool>(), any::<bool>())
        .prop_map(|(id, kind, tokens, carried, last_use)| TensorRef { id, kind, tokens, carried, last_use })
}

fn wire_task() -> impl Strategy<Value = WireTask> {
    let numbers = (any::<[u64; 3]>(), any::<[u32; 8]>());
    let names = ("[a-z]{0,20}", prop::option::of("[a-z]{1,20}"));
    let rest = (
        any::<bool>(),
        dtype(),
        prop::option::of(1..u64::from(u32::MAX)),
        prop::collection::vec(tensor(), 0..7),
    );
    (numbers, names, rest, geometry())
        .prop_flat_map(|(numbers, names, rest, geometry)| {
            let kv_heads = geometry.kv_heads();
            (
                Just((numbers, names, rest, geometry)),
                span(400),
                span(400),
                span(kv_heads),
                mask(400, kv_heads),
            )
        })
        .prop_filter_map(
            "the task holds a cell",
            |((numbers, names, rest, geometry), q, kv, kv_heads, mask)| {
                let ([id, step, plan_epoch], [layer, tick, attempt, slot, group, position, rank, index]) =
                    numbers;
                let (backward, result_dtype, deadline, tensors) = rest;
                let task = Task::new(DocumentId { rank, index }, q, kv, kv_heads, &mask).ok()?;
                let header = TaskHeader {
                    job: names.0,
                    step,
                    plan_epoch,
                    layer,
                    direction: if backward { Direction::Backward } else { Direction::Forward },
                    tick,
                    attempt,
                    slot,
                    group,
                    position,
                    numerics_id: names.1,
                    geometry,
                    task,
                    result_dtype,
                    deadline: deadline.map(Duration::from_millis),
                    key_homes: Vec::new(),
                    group_tasks: 0,
                };
                Some(WireTask { id, header, tensors })
            },
        )
}

fn document() -> impl Strategy<Value = Document> {
    let homes = prop::collection::vec((0..5u32, 1..100usize), 1..5);
    (any::<[u32; 3]>(), homes, any::<bool>()).prop_flat_map(|([rank, index, tick], lengths, placed)| {
        let mut at = 0;
        let home = |(rank, len)| {
            at += len;
            HomeRange { rank, tokens: Span::at(at - len, len) }
        };
        let homes: Vec<_> = lengths.into_iter().map(home).collect();
        let tokens = at;
        let mask = prop_oneof![Just(None), mask(tokens.max(6), 4).prop_map(Some)];
        let id = DocumentId { rank, index };
        let document = if placed { Document::new(id, tokens, homes) } else { Document::unplaced(id, tokens) };
        (Just((document, tick)), mask).prop_filter_map(
            "the mask lies within the document",
            move |((document, tick), mask)| {
                let document = document.ok()?.with_tick(tick);
                match mask {
                    None => Some(document),
                    // A slice without a cell would be dropped on the way.
                    Some(mask) => {
                        document.with_mask(mask.clip(Span::to(tokens), Span::to(tokens), Span::to(4))).ok()
                    }
                }
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn headers_come_back_as_they_went(task in wire_task()) {
        let bytes = v1::TaskHeader::from(&task).encode_to_vec();
        let wire = v1::TaskHeader::decode(&*bytes).unwrap();
        prop_assert_eq!(WireTask::try_from(wire).unwrap(), task);
    }

    #[test]
    fn documents_come_back_as_they_went(document in document()) {
        let bytes = v1::Document::from(&document).encode_to_vec();
        let wire = v1::Document::decode(&*bytes).unwrap();
        let back = Document::try_from(wire).unwrap();
        // A mask that counts nothing travels as a slice that counts nothing.
        if document.mask(4).parts().is_empty() {
            prop_assert_eq!(back.mask(4).cells(), 0);
        } else {
            prop_assert_eq!(back, document);
        }
    }

    #[test]
    fn planned_tasks_come_back_as_they_went(
        numbers in any::<[u32; 6]>(),
        (server_id, q, kv, kv_heads) in (any::<u64>(), span(1 << 30), span(1 << 30), span(4096)),
    ) {
        let [rank, index, slot, group, position, tick] = numbers;
        let task = PlannedTask { document: DocumentId { rank, index }, q, kv, kv_heads, slot, group, position };
        let assigned = AssignedTask { tick, server_id, task };
        prop_assert_eq!(AssignedTask::try_from(v1::PlannedTask::from(&assigned)).unwrap(), assigned);
    }

    #[test]
    fn bytes_at_random_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        convert_all(&bytes);
    }

    #[test]
    fn headers_with_bytes_changed_never_panic(
        task in wire_task(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = v1::TaskHeader::from(&task).encode_to_vec();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        convert_all(&bytes);
    }

    #[test]
    fn headers_with_wild_numbers_never_panic(
        task in wire_task(),
        wild in prop::collection::vec(prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 30), 0..500u64], 8),
        which in prop::collection::vec(0..10usize, 1..4),
    ) {
        let mut wire = v1::TaskHeader::from(&task);
        for field in which {
            let span = Some(v1::Span { start: wild[field % 4], end: wild[field % 4 + 1] });
            match field {
                0 => wire.q = span,
                1 => wire.kv = span,
                2 => wire.kv_heads = span,
                3 => wire.slices[0].q = span,
                4 => wire.slices[0].kv = span,
                5 => wire.slices[0].kv_heads = span,
                6 => wire.slices[0].lo = Some(wild[5] as i64),
                7 => wire.slices[0].hi = Some(wild[6] as i64),
                8 => wire.geometry.as_mut().unwrap().scale = f32::from_bits(wild[7] as u32),
                _ => wire.geometry.as_mut().unwrap().kv_heads = wild[7] as u32,
            }
        }
        if let Ok(task) = WireTask::try_from(wire) {
            // What is accepted can be counted.
            task.header.task.cells();
            task.header.task.shapes(&task.header.geometry);
        }
    }

    #[test]
    fn errors_come_back_as_they_went(code in 1..17i32, message in "[ -~]{0,200}", retry in 0..3usize) {
        let retry = [RetryHint::Never, RetryHint::Elsewhere, RetryHint::Later][retry];
        let error = TaskError { kind: ErrorKind::from_code(Code::from_i32(code)), message, retry };
        let status = Status::from(error.clone());
        prop_assert_eq!(status.code(), error.kind.code());
        prop_assert_eq!(status.message(), &error.message);
        prop_assert_eq!(TaskError::from(status), error);
    }
}

fn convert_all(bytes: &[u8]) {
    if let Ok(wire) = v1::TaskHeader::decode(bytes) {
        let _ = WireTask::try_from(wire).map(|task| v1::TaskHeader::from(&task));
    }
    if let Ok(wire) = v1::Document::decode(bytes) {
        let _ = Document::try_from(wire).map(|document| v1::Document::from(&document));
    }
    if let Ok(wire) = v1::PlannedTask::decode(bytes) {
        let _ = AssignedTask::try_from(wire);
    }
    if let Ok(wire) = v1::TensorRef::decode(bytes) {
        let _ = TensorRef::try_from(wire);
    }
    let _ = TaskError::from(Status::with_details(Code::Unknown, "x", bytes.to_vec().into()));
}

fn header() -> v1::TaskHeader {
    let document = DocumentId { rank: 1, index: 2 };
    let geometry = HeadGeometry::standard(8, 4, 16).unwrap();
    let task =
        Task::new(document, Span::new(10, 20).unwrap(), Span::to(20), Span::to(2), &Mask::causal(20, 4))
            .unwrap();
    let header = TaskHeader {
        job: "job-a".to_owned(),
        step: 3,
        plan_epoch: 0,
        layer: 4,
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
    let tensor =
        TensorRef { id: 5, kind: TensorKind::Q, tokens: Span::to(20), carried: true, last_use: true };
    (&WireTask { id: 9, header, tensors: vec![tensor] }).into()
}

/// The changed header is refused, and the error names the task and says `expected`.
#[track_caller]
fn refused(kind: ErrorKind, expected: &str, change: impl FnOnce(&mut v1::TaskHeader)) {
    let mut wire = header();
    change(&mut wire);
    let error = WireTask::try_from(wire).expect_err("it is refused");
    assert_eq!(error.kind, kind, "{error}");
    assert!(error.message.contains(expected), "{error}");
    assert!(error.message.contains("task 9") && error.message.contains("step 3, layer 4"), "{error}");
}

#[test]
fn every_fault_of_a_header_is_named() {
    use ErrorKind::{Invalid, Unsupported};
    let span = |start, end| Some(v1::Span { start, end });
    refused(Unsupported, "protocol_version is 7, and 2 is spoken here", |h| h.protocol_version = 7);
    refused(Invalid, "softcap is -1", |h| h.geometry.as_mut().unwrap().softcap = Some(-1.0));
    refused(Unsupported, "sink logits enter at home", |h| h.sink = true);
    refused(Invalid, "job has 257 bytes", |h| h.job = "x".repeat(MAX_NAME_BYTES + 1));
    refused(Invalid, "numerics_id has 257 bytes", |h| h.numerics_id = "x".repeat(MAX_NAME_BYTES + 1));
    refused(Invalid, "direction is not given", |h| h.direction = 0);
    refused(Invalid, "direction is 3", |h| h.direction = 3);
    refused(Invalid, "result_dtype is not given", |h| h.result_dtype = 0);
    refused(Invalid, "result_dtype is -1", |h| h.result_dtype = -1);
    refused(Invalid, "geometry is missing", |h| h.geometry = None);
    refused(Invalid, "geometry: dtype is not given", |h| h.geometry.as_mut().unwrap().dtype = 0);
    refused(Invalid, "geometry: scale is NaN", |h| h.geometry.as_mut().unwrap().scale = f32::NAN);
    refused(Invalid, "geometry: scale is -1", |h| h.geometry.as_mut().unwrap().scale = -1.0);
    refused(Invalid, "geometry: head_dim is 257", |h| h.geometry.as_mut().unwrap().head_dim = 257);
    refused(Invalid, "q_heads is 7, which kv_heads 4", |h| h.geometry.as_mut().unwrap().q_heads = 7);
    refused(Invalid, "document is missing", |h| h.document = None);
    refused(Invalid, "q is missing", |h| h.q = None);
    refused(Invalid, "kv: start 9 is above end 8", |h| h.kv = span(9, 8));
    refused(Invalid, "kv: end is 18446744073709551615", |h| h.kv = span(9, u64::MAX));
    refused(Invalid, "task.q [10, 10) is empty", |h| {
        h.q = span(10, 10);
        h.slices.clear();
    });
    refused(Invalid, "no cell", |h| h.slices.clear());
    refused(Invalid, "task.kv_heads [3, 5) reaches outside geometry.kv_heads [0, 4)", |h| {
        h.kv_heads = span(3, 5);
        h.slices[0].kv_heads = span(3, 5);
    });
    refused(Invalid, "slices[0]: slice.q [9, 20) reaches outside task.q [10, 20)", |h| {
        h.slices[0].q = span(9, 20)
    });
    refused(Invalid, "slices[0]: slice.kv [0, 21) reaches outside task.kv", |h| h.slices[0].kv = span(0, 21));
    refused(Invalid, "slices[0]: slice.kv_heads [0, 3)", |h| h.slices[0].kv_heads = span(0, 3));
    refused(Invalid, "slices[0]: q is missing", |h| h.slices[0].q = None);
    refused(Invalid, "slices[0]: band lo 2 is above hi 0", |h| h.slices[0].lo = Some(2));
    refused(Invalid, "mask slices 0 and 1 overlap", |h| h.slices.push(h.slices[0]));
    refused(Invalid, "slices has 4097 slices", |h| h.slices = vec![h.slices[0]; MAX_SLICES + 1]);
    refused(Invalid, "tensors[0]: kind is not given", |h| h.tensors[0].kind = 0);
    refused(Invalid, "tensors[0]: kind is 99", |h| h.tensors[0].kind = 99);
    refused(Invalid, "tensors[0]: tokens is missing", |h| h.tensors[0].tokens = None);
    refused(Invalid, "tensors[0]: tokens [4, 4) is empty", |h| h.tensors[0].tokens = span(4, 4));
    refused(Invalid, "tensors names 17 tensors", |h| h.tensors = vec![h.tensors[0]; 17]);
}

#[test]
fn a_task_of_more_cells_than_can_be_counted_is_refused() {
    let all = Some(v1::Span { start: 0, end: 1 << 30 });
    refused(ErrorKind::Invalid, "cells", |h| {
        let heads = Some(v1::Span { start: 0, end: 4096 });
        let geometry = h.geometry.as_mut().unwrap();
        (geometry.q_heads, geometry.kv_heads) = (4096, 4096);
        (h.q, h.kv, h.kv_heads) = (all, all, heads);
        h.slices = vec![v1::BandSlice { q: all, kv: all, kv_heads: heads, lo: None, hi: None }];
    });
}

#[test]
fn faults_of_documents_are_named() {
    let document = Document::new(
        DocumentId { rank: 0, index: 4 },
        10,
        vec![HomeRange { rank: 0, tokens: Span::to(10) }],
    );
    let wire = v1::Document::from(&document.unwrap());
    let check = |expected: &str, change: &dyn Fn(&mut v1::Document)| {
        let mut wire = wire.clone();
        change(&mut wire);
        let error = Document::try_from(wire).expect_err("it is refused");
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert!(error.message.contains(expected), "{error}");
    };
    check("document.id is missing", &|d| d.id = None);
    check("document 0.4: document.tokens is 0", &|d| d.tokens = 0);
    check("document 0.4: document.tokens is 18446744073709551615", &|d| d.tokens = u64::MAX);
    check("homes[0]: tokens is missing", &|d| d.homes[0].tokens = None);
    check("home ranges do not add up to [0, 11)", &|d| d.tokens = 11);
}

#[test]
fn plain_statuses_get_their_kinds_usual_hint() {
    for (code, kind, retry) in [
        (Code::Unavailable, ErrorKind::Unavailable, RetryHint::Elsewhere),
        (Code::ResourceExhausted, ErrorKind::Busy, RetryHint::Later),
        (Code::InvalidArgument, ErrorKind::Invalid, RetryHint::Never),
        (Code::Unknown, ErrorKind::Internal, RetryHint::Elsewhere),
    ] {
        let status = Status::new(code, "from elsewhere");
        assert_eq!(failure_of(&status), None);
        assert_eq!(TaskError::from(status), TaskError { kind, message: "from elsewhere".to_owned(), retry });
    }
}

#[test]
fn long_messages_are_shortened_on_the_way() {
    let error = TaskError::invalid("ü".repeat(100_000));
    let status = Status::from(error);
    assert!(status.message().ends_with("ü ..."));
    assert_eq!(status.message().chars().count(), 1504);
}

#[test]
fn another_protocol_version_is_refused_by_name() {
    check_protocol_version(outboard_proto::PROTOCOL_VERSION).unwrap();
    let error = check_protocol_version(0).unwrap_err();
    assert!(error.message.contains("protocol_version is 0, and 2 is spoken here"), "{error}");
}
