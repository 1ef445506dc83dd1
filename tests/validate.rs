//! `outboard validate` and `outboard advise` as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "nothing here starts servers")]
mod command_support;

use command_support::{outboard, outboard_fails, temporary_folder};
use serde_json::{Value, json};

fn lines(args: &[&str]) -> Vec<Value> {
    let text = outboard(&[args, &["--json", "-"]].concat());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn predictions_stay_as_near_to_what_was_published_as_the_documents_say() {
    let lines = lines(&["validate"]);
    let of = |kind: &'static str| lines.iter().filter(move |line| line["kind"] == kind);
    // A little more than each group's ends are off, which is what simulator/README.md says of them.
    let within = [
        ("8B, pretrain", [0.03, 0.03]),
        ("8B, prolong", [0.03, 0.03]),
        ("8B, pretrain, pipeline", [0.03, 0.03]),
        ("8B, prolong, pipeline", [0.03, 0.055]),
        ("34B, pretrain", [0.035, 0.035]),
        ("34B, prolong", [0.035, 0.035]),
        ("34B, pretrain, pipeline", [0.0, 0.03]),
        ("34B, prolong, pipeline", [0.0, 0.1]),
    ];
    let (mut distance, mut null, mut ends) = (0.0, 0.0, 0);
    for (group, (name, within)) in of("validation").zip(within) {
        assert_eq!(group["group"], name);
        for (n, within) in within.into_iter().enumerate() {
            let predicted = group["predicted"][n].as_f64().unwrap();
            let Some(published) = group["published"][n].as_f64() else { continue };
            assert!((predicted - published).abs() < within, "{group}");
            (distance, null) = (distance + (predicted - published).abs(), null + (1.13f64 - published).abs());
            ends += 1;
        }
    }
    assert_eq!(ends, 14);
    assert!(distance < 0.5 * null, "{distance} in all, and {null} of a constant");
    let errors: Vec<f64> = of("validation-step")
        .map(|step| {
            let seconds = |key: &str| step[key].as_f64().unwrap();
            (seconds("predicted_seconds") / seconds("measured_seconds") - 1.0).abs()
        })
        .collect();
    assert_eq!(errors.len(), 30);
    assert!(errors.iter().all(|error| *error < 0.07), "{errors:?}");
    assert!(errors.iter().sum::<f64>() / 30.0 < 0.02, "{errors:?}");
    let gains: Vec<f64> = of("validation-gain")
        .map(|gain| gain["predicted"].as_f64().unwrap() - gain["measured"].as_f64().unwrap())
        .collect();
    assert_eq!(gains.len(), 5);
    assert!(gains.iter().all(|points| points.abs() < 0.08), "{gains:?}");
    assert!(gains.iter().sum::<f64>() / 5.0 < 0.05, "{gains:?}");
    let facts: Vec<f64> = of("validation-fact").map(|fact| fact["predicted"].as_f64().unwrap()).collect();
    for (predicted, published, within) in [
        (facts[0], 0.19, 0.1),
        (facts[1], 0.55, 0.05),
        (facts[2], 0.03, 0.02),
        (facts[3], 0.4, 0.12),
        (facts[4], 0.135, 0.04),
        (facts[5], 0.135, 0.04),
        (facts[6], 0.135, 0.04),
    ] {
        assert!((predicted - published).abs() < within, "{predicted}, not {published}: {facts:?}");
    }
}

#[test]
fn the_steps_of_a_training_are_predicted_from_its_lines_and_a_profile() {
    let folder = temporary_folder();
    let file = |name: &str, lines: &[Value]| {
        let path = folder.path().join(name);
        std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // Both ranks' cores reach 2e9 FLOPs a second, whatever they compute.
    let grid = |direction| json!({ "direction": direction, "dtype": "f32", "head_dim": 32, "rows": [16], "keys": [16], "efficiency": [[1.0]] });
    let profile = file(
        "profile.json",
        &[
            json!({ "device": "test", "kernel_revision": "1", "peak_flops_per_second": 2e9, "task_overhead_seconds": 0.0, "grids": [grid("forward"), grid("backward")] }),
        ],
    );
    let model = json!({ "layers": 1, "dim": 64, "q_heads": 2, "kv_heads": 1, "head_dim": 32, "attention_dtype": "f32", "ffn_dim": 64, "vocab": 256, "rope_base": 10000.0, "norm_epsilon": 1e-5 });
    let job = json!({ "kind": "job", "model": model, "ranks": 2, "tokens": 1024, "in_place": true, "dedicated": 0, "token_slack": null });
    let forecast = json!({ "kind": "forecast", "rest_flops_per_second": 1e9, "bytes_per_second": 1e15 });
    let ranks = json!([{ "documents": [1024] }, { "documents": [512, 512] }]);
    let step = |attention, seconds| json!({ "kind": "step", "attention": attention, "seconds": seconds, "ranks": ranks });
    let run = file("run.jsonl", &[job.clone(), forecast.clone(), step("local", 0.8), step("pool", 0.6)]);
    let line = &lines(&["validate", "--train", &run, "--profile", &profile])[0];
    let near = |value: &Value, expected: f64, within: f64| {
        let value = value.as_f64().unwrap();
        assert!((value / expected - 1.0).abs() < within, "{value}, not {expected}: {line}");
    };
    let cells = |tokens: f64| tokens * (tokens + 1.0) / 2.0;
    let attention = |cells: f64| 14.0 * 32.0 * 2.0 * cells / 1e9;
    let weights = 64.0 * 32.0 * 4.0 + 64.0 * 64.0 + 3.0 * 64.0 * 64.0 + 256.0 * 64.0;
    let rest = 6.0 * weights * 1024.0 / 1e9;
    near(&line["local_seconds"][0], 0.8, 1e-9);
    near(&line["local_seconds"][1], rest + attention(cells(1024.0)), 1e-9);
    // Balanced to within the planner's tolerance.
    let mean = (cells(1024.0) + 2.0 * cells(512.0)) / 2.0;
    near(&line["pool_seconds"][1], rest + attention(mean), 0.01);
    near(&line["speedup"][0], 0.8 / 0.6, 1e-9);

    for (name, lines, expected) in [
        ("no-job.jsonl", vec![forecast.clone()], "no line of kind job"),
        ("no-forecast.jsonl", vec![job.clone()], "no line of kind forecast"),
        (
            "local.jsonl",
            vec![job.clone(), forecast.clone(), step("local", 0.8)],
            "1 local steps and 0 pooled",
        ),
    ] {
        let run = file(name, &lines);
        let refused = outboard_fails(&["validate", "--train", &run, "--profile", &profile]);
        assert!(refused.contains(name) && refused.contains(expected), "{refused}");
    }
    let refused = outboard_fails(&["validate", "--train", &run]);
    assert!(refused.contains("--profile"), "{refused}");
}

#[test]
fn advice_begins_with_yes_or_no() {
    let yes = outboard(&["advise", "--gpus", "64", "--steps", "2"]);
    assert!(yes.starts_with("Yes: attention servers in place are predicted to train "), "{yes}");
    assert!(yes.contains("worth it from "), "{yes}");
    let line = &lines(&["advise", "--gpus", "64", "--steps", "2"])[0];
    let own = line["links"].as_array().unwrap().iter().find(|link| link[0] == json!(50e9));
    assert_eq!(own.unwrap()[1], line["gain"], "the scenario's own link, in {line}");
    assert!(line["gain_over_published"].as_f64().is_some(), "{line}");
    let folder = temporary_folder();
    let lengths = folder.path().join("lengths.json");
    std::fs::write(&lengths, "[4096]").unwrap();
    let lengths = lengths.to_str().unwrap();
    let even = ["--mix", lengths, "--context", "4k", "--tokens", "1m", "--steps", "1"];
    let no = outboard(&[&["advise"], even.as_slice()].concat());
    assert!(no.starts_with("No: attention is "), "{no}");
    let line = &lines(&[&["advise"], even.as_slice()].concat())[0];
    assert_eq!(line["worth"], json!(false));
    assert!(line["gain"].as_f64().unwrap() < 0.02, "{line}");
    let again = &lines(&[&["advise"], even.as_slice()].concat())[0];
    assert_eq!(line, again);
}

#[test]
fn servers_that_cannot_do_it_or_are_too_few_are_advised_against() {
    let full = ["advise", "--pipeline", "2", "--micro-batches", "8", "--recompute", "none", "--steps", "1"];
    let no = outboard(&full);
    assert!(no.starts_with("No: attention servers cannot do it; outboard needs "), "{no}");
    let line = &lines(&full)[0];
    assert_eq!((&line["worth"], &line["gain"]), (&json!(false), &Value::Null), "{line}");
    assert!(line["without_tokens_per_second"].as_f64().unwrap() > 0.0, "{line}");
    let no = outboard(&["advise", "--dedicated", "16", "--steps", "1"]);
    assert!(no.starts_with("No: the dedicated servers are too few "), "{no}");
}

#[test]
fn what_servers_keep_takes_memory_however_many_nano_batches_there_are() {
    let memory = |more: &[&str]| {
        let args = ["simulate", "--policy", "outboard-fixed-homes", "--steps", "1"];
        let line = &lines(&[&args, more].concat())[0];
        line["memory_bytes"]["attention_of_others"].as_f64().unwrap_or_else(|| panic!("{line}"))
    };
    let [one, two] = [memory(&["--keep", "--nano-batches", "1"]), memory(&["--keep", "--nano-batches", "2"])];
    assert!((two / one - 1.0).abs() < 0.35, "{one} and {two}");
    assert!(two > 10.0 * memory(&[]), "{two}, and {} where nothing is kept", memory(&[]));
}

#[test]
fn advice_is_refused_where_nothing_fits() {
    let refused = outboard_fails(&["advise", "--gpus", "8", "--steps", "1"]);
    assert!(refused.contains(" GB too much; the largest part is activations"), "{refused}");
    assert!(refused.contains("nothing can do it, with attention servers or without"), "{refused}");
    let refused = outboard_fails(&["advise", "--sweep", "gpus=8,16"]);
    assert!(refused.contains("sweep"), "{refused}");
    let refused = outboard_fails(&["advise", "--gpus", "20"]);
    assert!(refused.contains("20 GPUs of the model are no multiple of tensor 8"), "{refused}");
}
