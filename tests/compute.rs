//! `outboard compute` as a user runs it: files in, files out, against the reference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "nothing here starts servers")]
mod command_support;

use std::collections::BTreeMap;
use std::path::Path;

use command_support::{outboard, outboard_fails, temporary_folder};
use half::{bf16, f16};
use outboard_attention::reference::{self, Inputs, OutputGradient};
use outboard_attention::{
    BandSlice, DType, DocumentId, HeadGeometry, HeadShape, Mask, MaskPart, Span, Task, TensorView,
};
use serde_json::{Value, json};

/// A slice of a mask: kv heads, queries, keys, band.
type Slice = ([usize; 2], [usize; 2], [usize; 2], Option<i64>, Option<i64>);

/// A task with its tensors, as values of its element type.
struct Case {
    name: String,
    geometry: HeadGeometry,
    task: Task,
    mask: Option<Vec<Slice>>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    lse: Vec<f64>,
    d: Vec<f64>,
}

/// What a run wrote, by file name.
type Written = BTreeMap<String, Vec<f32>>;

fn span([start, end]: [usize; 2]) -> Span {
    Span::new(start, end).unwrap()
}

fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Numbers between -2 and 2 that look like noise, the same for the same seed.
fn noise(seed: u64, dtype: DType, shape: [usize; 3]) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        rounded(dtype, (state >> 40) as f32 / (1u64 << 22) as f32 - 2.0)
    };
    std::iter::repeat_with(next).take(shape.iter().product()).collect()
}

fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    let element = |&x: &f32| match dtype {
        DType::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(element).collect()
}

fn singles(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

impl Case {
    fn new(n: u64, shape: HeadShape, [q, kv, heads]: [[usize; 2]; 3], slices: Option<Vec<Slice>>) -> Case {
        let geometry = HeadGeometry::try_from(shape).unwrap();
        let causal = || vec![(heads, q, kv, None, Some(0))];
        let part = |(heads, q, kv, lo, hi): Slice| MaskPart {
            kv_heads: span(heads),
            slice: BandSlice::new(span(q), span(kv), lo, hi).unwrap(),
        };
        let parts = slices.clone().unwrap_or_else(causal).into_iter().map(part).collect();
        let document = DocumentId { rank: 0, index: 0 };
        let task = Task::new(document, span(q), span(kv), span(heads), &Mask::new(parts).unwrap()).unwrap();
        let shapes = task.shapes(&geometry);
        let tensor = |seed, shape| noise(4 * n + seed, geometry.dtype(), shape);
        let mut case = Case {
            name: format!("t{n}.x"),
            geometry,
            q: tensor(1, shapes.q),
            k: tensor(2, shapes.k),
            v: tensor(3, shapes.v),
            d_o: tensor(4, shapes.o),
            lse: Vec::new(),
            d: Vec::new(),
            mask: slices,
            task,
        };
        let forward = reference::forward(&geometry, &case.task, case.inputs()).unwrap();
        case.d = reference::row_dots(TensorView::contiguous("d_o", &case.d_o, shapes.o).unwrap(), &forward.o);
        case.lse = forward.lse;
        // The command is given these rounded, and so is the reference.
        for values in [&mut case.d, &mut case.lse] {
            values.iter_mut().for_each(|x| *x = f64::from(*x as f32));
        }
        case
    }

    fn inputs(&self) -> Inputs<'_> {
        let shapes = self.task.shapes(&self.geometry);
        Inputs {
            q: TensorView::contiguous("q", &self.q, shapes.q).unwrap(),
            k: TensorView::contiguous("k", &self.k, shapes.k).unwrap(),
            v: TensorView::contiguous("v", &self.v, shapes.v).unwrap(),
        }
    }

    fn json(&self, direction: &str) -> Value {
        let HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap } =
            self.geometry.shape();
        let ends = |span: Span| json!([span.start(), span.end()]);
        let mut task = json!({
            "name": self.name,
            "direction": direction,
            "geometry": { "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim,
                "v_head_dim": v_head_dim, "scale": scale, "dtype": dtype.to_string() },
            "q": ends(self.task.q()), "kv": ends(self.task.kv()), "kv_heads": ends(self.task.kv_heads()),
        });
        if let Some(softcap) = softcap {
            task["geometry"]["softcap"] = json!(softcap);
        }
        if let Some(slices) = &self.mask {
            let slice = |(kv_heads, q, kv, lo, hi): &Slice| json!({ "kv_heads": kv_heads, "q": q, "kv": kv, "lo": lo, "hi": hi });
            task["mask"] = slices.iter().map(slice).collect();
        }
        task
    }

    fn write(&self, folder: &Path, direction: &str) {
        let dtype = self.geometry.dtype();
        let put = |suffix: &str, bytes: Vec<u8>| {
            std::fs::write(folder.join(format!("{}.{suffix}", self.name)), bytes).unwrap();
        };
        put("q", bytes(dtype, &self.q));
        put("k", bytes(dtype, &self.k));
        put("v", bytes(dtype, &self.v));
        if direction == "backward" {
            put("d_o", bytes(dtype, &self.d_o));
            put("lse", bytes(DType::F32, &singles(&self.lse)));
            put("d", bytes(DType::F32, &singles(&self.d)));
        }
    }

    /// What should have been written, by the suffix of the file.
    fn expected(&self, direction: &str) -> Vec<(&'static str, Vec<f64>)> {
        if direction == "forward" {
            let forward = reference::forward(&self.geometry, &self.task, self.inputs()).unwrap();
            return vec![("o", forward.o), ("lse_out", forward.lse)];
        }
        let shapes = self.task.shapes(&self.geometry);
        let d_o = TensorView::contiguous("d_o", &self.d_o, shapes.o).unwrap();
        let gradient = OutputGradient { d_o, lse: &self.lse, d: &self.d };
        let backward = reference::backward(&self.geometry, &self.task, self.inputs(), gradient).unwrap();
        vec![("dq", backward.dq), ("dk", backward.dk), ("dv", backward.dv)]
    }
}

fn write_batch(folder: &Path, tasks: &[Value]) {
    let batch = json!({ "version": 1, "tasks": tasks });
    std::fs::write(folder.join("batch.json"), batch.to_string()).unwrap();
}

/// Computes both directions of all cases in folders of their own.
fn compute(cases: &[Case], more: &[&str]) -> Written {
    let mut written = Written::new();
    for direction in ["forward", "backward"] {
        let folder = temporary_folder();
        for case in cases {
            case.write(folder.path(), direction);
        }
        write_batch(folder.path(), &cases.iter().map(|case| case.json(direction)).collect::<Vec<_>>());
        outboard(&[&["compute", folder.path().to_str().unwrap()], more].concat());
        for (case, (suffix, _)) in
            cases.iter().flat_map(|case| case.expected(direction).into_iter().map(move |e| (case, e)))
        {
            let name = format!("{}.{suffix}", case.name);
            let bytes = std::fs::read(folder.path().join(&name)).unwrap();
            let singles = bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            written.insert(name, singles.collect());
        }
    }
    written
}

fn heads(q_heads: usize, kv_heads: usize, dims: [usize; 2], dtype: DType) -> HeadShape {
    let [head_dim, v_head_dim] = dims;
    HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale: 0.25, dtype, softcap: None }
}

fn cases(dtype: DType) -> Vec<Case> {
    let capped = HeadShape { softcap: Some(3.0), ..heads(2, 1, [8, 8], dtype) };
    let sinks =
        vec![([2, 3], [40, 90], [0, 4], None, Some(0)), ([2, 4], [50, 90], [4, 90], Some(-9), Some(0))];
    vec![
        Case::new(0, heads(4, 4, [16, 16], dtype), [[0, 33], [0, 33], [0, 4]], None),
        Case::new(1, heads(4, 2, [16, 24], dtype), [[200, 240], [0, 240], [1, 2]], None),
        Case::new(2, heads(8, 4, [24, 16], dtype), [[40, 90], [0, 90], [2, 4]], Some(sinks)),
        Case::new(
            3,
            capped,
            [[10, 20], [5, 150], [0, 1]],
            Some(vec![([0, 1], [0, 99], [0, 999], Some(0), None)]),
        ),
    ]
}

fn error_of(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let (mut error, mut whole) = (0.0, 0.0);
    for (actual, expected) in actual.iter().zip(expected) {
        if expected.is_infinite() {
            assert_eq!(f64::from(*actual), *expected, "the LSE of a row without keys");
            continue;
        }
        error += (f64::from(*actual) - expected).powi(2);
        whole += expected.powi(2);
    }
    (error / whole).sqrt()
}

#[test]
fn results_are_those_of_the_reference_and_no_bit_depends_on_the_batch() {
    for (dtype, most) in [(DType::F32, 2e-6), (DType::Bf16, 8e-3), (DType::F16, 2e-6)] {
        let cases = cases(dtype);
        let written = compute(&cases, &[]);
        for case in &cases {
            for (suffix, expected) in
                [case.expected("forward"), case.expected("backward")].into_iter().flatten()
            {
                let name = format!("{}.{suffix}", case.name);
                let error = error_of(&written[&name], &expected);
                assert!(error < most, "{dtype} {name}: {error:e}");
            }
        }
        let bits = |written: Written| -> BTreeMap<String, Vec<u32>> {
            let bits = |values: Vec<f32>| values.iter().map(|x| x.to_bits()).collect();
            written.into_iter().map(|(name, values)| (name, bits(values))).collect()
        };
        let written = bits(written);
        assert!(written == bits(compute(&cases, &["--alone"])), "{dtype}: --alone");
        assert!(written == bits(compute(&cases, &["--threads", "3"])), "{dtype}: --threads");
    }
}

#[test]
fn it_says_what_it_computed() {
    let folder = temporary_folder();
    let cases = cases(DType::Bf16);
    cases[0].write(folder.path(), "forward");
    cases[1].write(folder.path(), "backward");
    write_batch(folder.path(), &[cases[0].json("forward"), cases[1].json("backward")]);
    let path = folder.path().to_str().unwrap();
    let words = outboard(&["compute", path, "--isa", "portable", "--threads", "1"]);
    assert_eq!(words.lines().count(), 3, "{words}");
    assert!(words.contains("t0.x") && words.contains("backward") && words.contains("2 tasks in 1 batches"));
    let words = outboard(&["compute", path, "--isa", "portable", "--threads", "1", "--alone", "--json"]);
    let lines: Vec<Value> = words.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [first, second, total] = &lines[..] else { panic!("{words}") };
    assert_eq!(
        (&first["kind"], &first["name"], &first["cells"]),
        (&json!("task"), &json!("t0.x"), &json!(4 * 33 * 17))
    );
    assert_eq!((&second["direction"], &second["dtype"]), (&json!("backward"), &json!("bf16")));
    assert_eq!(first["flops"], json!(2.0 * f64::from(4 * 33 * 17) * 32.0));
    assert_eq!((&total["kind"], &total["tasks"], &total["batches"]), (&json!("total"), &json!(2), &json!(2)));
    assert_eq!(total["numerics_ids"], json!([first["numerics_id"]]));
    assert!(first["numerics_id"].as_str().unwrap().starts_with("cpu-portable-bf16"));
    assert!(total["device"].as_str().unwrap().starts_with("cpu"));
    assert!(total["seconds"].as_f64().unwrap() > 0.0);
}

/// A change to a sound task, and what the refusal must say.
type Refusal = (fn(&mut Value), &'static [&'static str]);

#[test]
fn what_is_no_batch_is_refused_by_file_task_and_field() {
    let folder = temporary_folder();
    let path = folder.path().to_str().unwrap();
    let case = &cases(DType::Bf16)[0];
    case.write(folder.path(), "backward");
    let sound = case.json("backward");
    let changes: [Refusal; 24] = [
        (|t| t["colour"] = json!(1), &["tasks[1] (t0.x)", "colour", "unknown field"]),
        (|t| t["geometry"]["colour"] = json!(1), &["tasks[1]", "colour", "unknown field"]),
        (|t| t["mask"] = json!([{ "q": [0, 1], "kv": [0, 1], "low": 1 }]), &["tasks[1]", "low"]),
        (|t| t["q"] = json!([0]), &["tasks[1]", "length 1"]),
        (|t| t["q"] = json!([-1, 2]), &["tasks[1]", "-1"]),
        (|t| t["q"] = json!([9, 2]), &["tasks[1] (t0.x)", "q is [9, 2]", "backwards"]),
        (|t| t["kv"] = json!([2, 2]), &["kv is [2, 2)", "empty"]),
        (|t| t["kv"] = json!([0, 1u64 << 40]), &["tasks[1]", "kv.end", "1099511627776"]),
        (|t| t["kv_heads"] = json!([2, 5]), &["kv_heads [2, 5)", "[0, 4)"]),
        (|t| t["direction"] = json!("sideways"), &["tasks[1]", "sideways", "forward"]),
        (|t| t["geometry"]["dtype"] = json!("f64"), &["tasks[1]", "f64", "bf16"]),
        (|t| t["geometry"]["scale"] = json!(0), &["tasks[1]", "geometry", "scale is 0"]),
        (|t| t["geometry"]["scale"] = json!(-1.0), &["scale is -1"]),
        (|t| t["geometry"]["scale"] = json!(1e300), &["scale is inf"]),
        (|t| t["geometry"]["scale"] = json!(null), &["tasks[1]", "null"]),
        (|t| t["geometry"]["softcap"] = json!(-1), &["softcap is -1"]),
        (|t| t["geometry"]["kv_heads"] = json!(3), &["q_heads is 4", "3"]),
        (|t| t["geometry"]["head_dim"] = json!(257), &["head_dim is 257", "256"]),
        (|t| t["geometry"]["v_head_dim"] = json!(0), &["v_head_dim is 0"]),
        (|t| t["mask"] = json!([]), &["tasks[1] (t0.x)", "mask is empty"]),
        (|t| t["mask"] = json!([{ "q": [0, 1], "kv": [5, 9], "hi": 0 }]), &["mask counts no cell"]),
        (|t| t["mask"] = json!([{ "q": [0, 1], "kv": [0, 1], "lo": 2, "hi": 1 }]), &["mask[0]", "lo 2"]),
        (
            |t| t["mask"] = json!([{ "q": [0, 9], "kv": [0, 9] }, { "q": [8, 20], "kv": [8, 20] }]),
            &["mask", "slices 0 and 1 overlap"],
        ),
        (
            |t| t["mask"] = json!([{ "q": [0, 9], "kv": [0, 9], "kv_heads": [0, 9] }]),
            &["mask[0]", "kv_heads is [0, 9)", "4"],
        ),
    ];
    let refused = |tasks: &[Value], parts: &[&str]| {
        write_batch(folder.path(), tasks);
        let message = outboard_fails(&["compute", path]);
        for part in parts.iter().chain(&["batch.json"]) {
            assert!(message.contains(part), "{part:?} is missing in: {message}");
        }
    };
    for (change, parts) in changes {
        let mut first = sound.clone();
        first["name"] = json!("other");
        let mut second = sound.clone();
        change(&mut second);
        refused(&[first, second], parts);
    }
    for name in ["", ".", "..", "../up", "/etc/passwd", "a/b", "a\\b", ".hidden", "a b", "a\u{0}b", "\u{e9}"]
    {
        let mut task = sound.clone();
        task["name"] = json!(name);
        refused(&[task], &["tasks[0]", "name is"]);
    }
    refused(&[sound.clone(), sound.clone()], &["tasks[1]", "t0.x", "taken"]);
    refused(&[], &["tasks is empty"]);
    for (text, part) in [
        ("", "EOF"),
        ("{}", "version"),
        ("{\"version\": 2, \"jobs\": []}", "version is 2"),
        ("{\"version\": 1, \"tasks\": [], \"seed\": 1}", "seed"),
        ("{\"version\": 1, \"tasks\": [{\"scale\": NaN}]}", "line 1"),
    ] {
        std::fs::write(folder.path().join("batch.json"), text).unwrap();
        let message = outboard_fails(&["compute", path]);
        assert!(message.contains(part) && message.contains("batch.json"), "{part:?}: {message}");
    }
}

#[test]
fn files_that_do_not_fit_are_refused_by_name_and_nothing_is_written() {
    let folder = temporary_folder();
    let path = folder.path().to_str().unwrap();
    let case = &cases(DType::Bf16)[0];
    write_batch(folder.path(), &[case.json("backward")]);
    for suffix in ["q", "k", "v", "d_o", "lse", "d"] {
        let name = format!("t0.x.{suffix}");
        let file = folder.path().join(&name);
        let refused = |parts: &[&str]| {
            let message = outboard_fails(&["compute", path]);
            for part in parts.iter().chain(&[&name[..], "t0.x"]) {
                assert!(message.contains(part), "{part:?} is missing in: {message}");
            }
        };
        case.write(folder.path(), "backward");
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[1..]).unwrap();
        refused(&[
            &format!("holds {} bytes", whole.len() - 1),
            &format!("needs {}", whole.len()),
            "33 tokens",
        ]);
        std::fs::write(&file, [&whole[..], &[0, 0]].concat()).unwrap();
        refused(&[&format!("holds {} bytes", whole.len() + 2)]);
        std::fs::remove_file(&file).unwrap();
        refused(&["cannot read", "backward"]);
        std::fs::create_dir(&file).unwrap();
        refused(&["is not a file"]);
        std::fs::remove_dir(&file).unwrap();
    }
    assert!(!folder.path().join("t0.x.dq").exists());
}

#[test]
fn devices_and_flags_that_are_not_there_are_refused() {
    let folder = temporary_folder();
    let path = folder.path().to_str().unwrap();
    let case = &cases(DType::F32)[0];
    case.write(folder.path(), "forward");
    write_batch(folder.path(), &[case.json("forward")]);
    let cases: [(&[&str], &[&str]); 4] = [
        (&["compute", "/nowhere/at/all"], &["/nowhere/at/all", "batch.json"]),
        (&["compute", path, "--device", "abacus:0"], &["--device", "abacus:0"]),
        (&["compute", path, "--threads", "0"], &["--threads", "0"]),
        (&["compute", path, "--isa", "abacus"], &["--isa", "abacus", "avx2"]),
    ];
    for (args, parts) in cases {
        let message = outboard_fails(args);
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is missing in: {message}");
        }
    }
    let mut vast = case.json("forward");
    vast["q"] = json!([0, 1 << 30]);
    vast["kv"] = json!([0, 1 << 30]);
    write_batch(folder.path(), &[vast]);
    let message = outboard_fails(&["compute", path]);
    assert!(message.contains("GiB") && message.contains("memory"), "{message}");
    // Bands without bound in all but name.
    let mut wide = case.json("forward");
    wide["mask"] = json!([{ "q": [0, u64::MAX], "kv": [0, u64::MAX], "lo": i64::MIN, "hi": i64::MAX }]);
    write_batch(folder.path(), &[wide]);
    outboard(&["compute", path]);
}
