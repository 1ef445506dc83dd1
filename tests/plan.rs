//! `outboard plan`, `outboard profile` and `outboard bench plan` as a user runs them: files in, plans and figures out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "nothing here starts servers")]
mod command_support;

use command_support::{outboard, outboard_fails, outboard_says, read_json, temporary_folder};
use serde_json::{Value, json};

#[test]
fn a_step_is_planned_by_every_policy() {
    let folder = temporary_folder();
    let step = folder.path().join("step.json");
    let document = |rank: u64, tokens: u64| json!({ "id": rank, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let content = json!({
        "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 0, "rank": 0 }, { "id": 1, "rank": 1 }],
        "documents": [document(0, 9001), document(1, 1)],
    });
    std::fs::write(&step, content.to_string()).unwrap();
    let step = step.to_str().unwrap();
    // Rows that server 1 computes of document 0, times heads.
    let moved = |args: &[&str]| {
        let plan: Value = serde_json::from_str(&outboard(&[&["plan", step], args].concat())).unwrap();
        let tasks = plan["tasks"].as_array().unwrap().iter();
        let moved = tasks.filter(|task| task["document"] == 0 && task["server"] == 1);
        let length = |range: &Value| range[1].as_u64().unwrap() - range[0].as_u64().unwrap();
        moved.map(|task| length(&task["q"]) * length(&task["kv_heads"])).sum::<u64>()
    };
    assert_eq!(moved(&[]), moved(&["--policy", "outboard", "--tolerance", "0.01"]));
    assert!(moved(&[]) > 0);
    assert_eq!(moved(&["--policy", "fixed"]), 0);
    assert_eq!(moved(&["--policy", "wlb"]), 0);
    assert_eq!(moved(&["--policy", "cp"]), 9000);
    // Half of the cells, as pairs of rows from the middle.
    assert_eq!(moved(&["--policy", "distca", "--tolerance", "0"]), 9000);
    assert_eq!(moved(&["--policy", "distca", "--tolerance", "1"]), 0);
    let refused = outboard_fails(&["plan", step, "--policy", "cp", "--tolerance", "0.1"]);
    assert!(refused.contains("--tolerance means nothing to policy cp"), "{refused}");
    let unknown = outboard_fails(&["plan", step, "--policy", "best"]);
    assert!(unknown.contains("outboard, fixed, wlb, cp, distca"), "{unknown}");
}

#[test]
fn what_servers_say_of_memory_and_links_is_planned_for() {
    let folder = temporary_folder();
    let step = folder.path().join("step.json");
    let step = step.to_str().unwrap();
    let write = |second: Value| {
        let content = json!({
            "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
            "servers": [{ "id": 0, "rank": 0 }, second],
            "documents": [{ "id": 0, "tokens": 9001, "home": [{ "rank": 0, "start": 0, "end": 9001 }] }],
            "bytes_per_second": 1e12,
        });
        std::fs::write(step, content.to_string()).unwrap();
    };
    let tasks_of = |server: u64| {
        let plan: Value = serde_json::from_str(&outboard(&["plan", step])).unwrap();
        plan["tasks"].as_array().unwrap().iter().filter(|task| task["server"] == server).count()
    };
    write(json!({ "id": 1, "rank": null }));
    assert!(tasks_of(1) > 0);
    for second in [
        json!({ "id": 1, "rank": null, "memory_bytes": 0 }),
        json!({ "id": 1, "rank": null, "bytes_per_second": 1e6 }),
    ] {
        write(second.clone());
        assert_eq!(tasks_of(1), 0, "{second}");
    }
    // What is held once fits; what is kept for many layers does not.
    let room = json!({ "id": 1, "rank": null, "memory_bytes": 1_000_000 });
    write(room.clone());
    let once = tasks_of(1);
    let content: Value = serde_json::from_str(&std::fs::read_to_string(step).unwrap()).unwrap();
    let kept = |layers: Value| {
        let mut content = content.clone();
        content["kept"] = layers;
        std::fs::write(step, content.to_string()).unwrap();
    };
    kept(json!(1_000_000));
    assert!(once > 0 && tasks_of(1) == 0, "{once}");
    kept(json!(0));
    let message = outboard_fails(&["plan", step]);
    assert!(message.contains("kept is 0"), "{message}");
    write(json!({ "id": 1, "rank": null, "bytes_per_second": 1e-9 }));
    let message = outboard_fails(&["plan", step]);
    assert!(message.contains("servers[1].bytes_per_second"), "{message}");
    let dedicated = json!({
        "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 7, "rank": null, "memory_bytes": 1000 }],
        "documents": [{ "id": 0, "tokens": 90, "home": [{ "rank": 0, "start": 0, "end": 90 }] }],
    });
    std::fs::write(step, dedicated.to_string()).unwrap();
    let message = outboard_fails(&["plan", step]);
    assert!(message.contains("may hold 1000") && message.contains("server 7"), "{message}");
}

#[test]
fn a_profile_has_an_efficiency_for_each_size() {
    let folder = temporary_folder();
    let file = folder.path().join("PROFILE.json");
    let axes = ["--head-dim", "8", "--rows", "4,16", "--keys", "8,16,32", "--dtype", "f32"];
    let how = ["--simd", "portable", "--threads", "1", "--repeats", "1"];
    outboard(&[&["profile", "--out", file.to_str().unwrap()], &axes[..], &how].concat());
    let profile = read_json(&file).remove(0);
    assert_eq!(profile["device"], "cpu portable 1 threads");
    assert!(profile["kernel_revision"].as_str().unwrap().parse::<u32>().is_ok());
    for key in ["peak_flops_per_second", "task_overhead_seconds"] {
        assert!(profile[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let grids = profile["grids"].as_array().unwrap();
    assert_eq!(grids.len(), 2);
    for (grid, direction) in grids.iter().zip(["forward", "backward"]) {
        let axes = json!({ "direction": direction, "dtype": "f32", "head_dim": 8, "rows": [4, 16], "keys": [8, 16, 32],
            "efficiency": grid["efficiency"] });
        assert_eq!(grid, &axes);
        let efficiency: Vec<Vec<f64>> = serde_json::from_value(grid["efficiency"].clone()).unwrap();
        assert_eq!(efficiency.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
        assert!(efficiency.iter().flatten().all(|value| (0.0..=1.0).contains(value)), "{efficiency:?}");
    }
}

#[test]
fn slow_links_keep_work_at_home_unless_a_tolerance_is_asked_for() {
    let folder = temporary_folder();
    let document = |rank: u64, tokens: u64| json!({ "id": rank, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let planned = |rate: &str, value: f64, more: &[&str]| {
        let step = folder.path().join("step.json");
        let content = json!({
            "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
            "servers": [{ "id": 0, "rank": 0 }, { "id": 1, "rank": 1 }],
            "documents": [document(0, 9001), document(1, 700)],
            rate: value,
        });
        std::fs::write(&step, content.to_string()).unwrap();
        let plan = outboard(&[&["plan", step.to_str().unwrap()], more].concat());
        let plan: Value = serde_json::from_str(&plan).unwrap();
        plan["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|task| task["document"] == 0 && task["server"] == 1)
            .count()
    };
    assert_eq!(planned("bytes_per_second", 1e3, &[]), 0);
    assert!(planned("bytes_per_second", 1e3, &["--tolerance", "0.01"]) > 0);
    assert!(planned("bytes_per_second", 1e15, &[]) > 0);
    assert!(planned("flops_per_second", 1e3, &[]) > 0, "without links only balance counts");
}

#[test]
fn a_profile_says_how_long_a_plan_takes() {
    let folder = temporary_folder();
    let [step, file] = ["step.json", "PROFILE.json"].map(|name| folder.path().join(name));
    let document = |rank: u64, tokens: u64| json!({ "id": rank, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let content = |more: Value| {
        let mut content = json!({
            "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
            "servers": [{ "id": 0, "rank": 0 }, { "id": 1, "rank": 1 }],
            "documents": [document(0, 9001), document(1, 700)],
        });
        content.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(&step, content.to_string()).unwrap();
    };
    let grid = |direction: &str, efficiency: f64| {
        json!({ "direction": direction, "dtype": "bf16", "head_dim": 64, "rows": [1], "keys": [1],
            "efficiency": [[efficiency]] })
    };
    let sound = json!({ "device": "test", "kernel_revision": "1", "peak_flops_per_second": 1e12,
        "grids": [grid("forward", 0.5), grid("backward", 0.25)], "task_overhead_seconds": 0 });
    let write = |profile: &Value| std::fs::write(&file, profile.to_string()).unwrap();
    let plan = |profile: &str| {
        let (plan, said) = outboard_says(&["plan", step.to_str().unwrap(), "--profile", profile]);
        let plan: Value = serde_json::from_str(&plan).unwrap();
        (plan["tasks"].clone(), said)
    };
    let file_name = file.to_str().unwrap();

    content(json!({}));
    write(&sound);
    let (tasks, said) = plan(file_name);
    let plain: Value = serde_json::from_str(&outboard(&["plan", step.to_str().unwrap()])).unwrap();
    assert_eq!(tasks, plain["tasks"], "without links a profile changes no plan");
    // 1 of 3.5 parts of the FLOPs take 2 at half of the peak, the rest 10 at a quarter.
    for part in ["compute ms", "predicted a layer: compute ", "70.8% of all compute time lost"] {
        assert!(said.contains(part), "{part:?} is missing in: {said}");
    }
    assert!(!said.contains("layer time"), "{said}");
    for name in ["cpu", "h100", "h200"] {
        assert!(plan(name).1.contains("predicted a layer"), "{name}");
    }

    // Work moves over links this slow where the profile's device computes it, and not where the step's would.
    content(json!({ "bytes_per_second": 1e7, "flops_per_second": 1e16 }));
    let moved = |tasks: &Value| {
        let tasks = tasks.as_array().unwrap().iter();
        tasks.filter(|task| task["document"] == 0 && task["server"] == 1).count()
    };
    let fast: Value = serde_json::from_str(&outboard(&["plan", step.to_str().unwrap()])).unwrap();
    assert_eq!(moved(&fast["tasks"]), 0);
    let slow = json!({ "peak_flops_per_second": 1e10 });
    let mut device = sound.clone();
    device.as_object_mut().unwrap().extend(slow.as_object().unwrap().clone());
    write(&device);
    let (tasks, said) = plan(file_name);
    assert!(moved(&tasks) > 0);
    assert!(said.contains("flops_per_second is not used") && said.contains("layer time: "), "{said}");

    let refused = |profile: &str, parts: &[&str]| {
        let message = outboard_fails(&["plan", step.to_str().unwrap(), "--profile", profile]);
        for part in parts {
            assert!(message.contains(part), "{part:?} is missing in: {message}");
        }
    };
    for (field, value, says) in [
        ("/grids/1/efficiency/0/0", json!(1.5), "profile.grids[1].efficiency[0][0] is 1.5"),
        ("/grids/0/dtype", json!("f8"), "profile.grids[0].dtype"),
        ("/task_overhead_seconds", json!("none"), "\"none\""),
        ("/grids/0", json!({ "speed": 1 }), "unknown field `speed`"),
    ] {
        let mut bad = sound.clone();
        *bad.pointer_mut(field).unwrap() = value;
        write(&bad);
        refused(file_name, &[file_name, says]);
    }
    std::fs::write(&file, "{").unwrap();
    refused(file_name, &[file_name, "not a valid profile"]);
    refused("h300", &["h300", "cpu, h100, h200"]);
}

#[test]
fn the_plan_benchmark_judges_every_step_whole_and_as_a_lane() {
    let folder = temporary_folder();
    let write =
        |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let document = |id: u64, rank: u64, tokens: u64| json!({ "id": id, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let step = json!({
        "model": { "q_heads": 8, "kv_heads": 4, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 0, "rank": 0 }, { "id": 1, "rank": 1, "speed": 1.5 }],
        "documents": [document(0, 0, 9000), document(1, 1, 700), document(2, 1, 1200)],
    });
    write("first.step.json", &step);
    write("second.step.json", &step);
    let rival = json!({ "valid": true, "max_over_mean": 1.0, "forward_gb": 0.02, "backward_gb": 0.03,
        "busiest_mb": 20.0, "busiest_backward_mb": 30.0 });
    write("distca.json", &json!({ "first@0.0": rival, "first@0.1": rival }));
    let args = ["bench", "plan", "--steps", folder.path().to_str().unwrap(), "--repeats", "1"];
    let words = outboard(&[&args[..], &["--json", "-"]].concat());
    let lines: Vec<Value> = words.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let plans: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "plan").collect();
    let name = |line: &Value| json!([line["step"], line["part"], line["kv_heads"]]);
    let expected =
        [("first", "whole", 4), ("first", "lane", 1), ("second", "whole", 4), ("second", "lane", 1)];
    assert_eq!(plans.iter().map(|line| name(line)).collect::<Vec<_>>(), expected.map(|part| json!(part)));
    for line in &plans {
        assert_eq!(
            (&line["policy"], &line["servers"], &line["documents"]),
            (&json!("outboard"), &json!(2), &json!(3))
        );
        for key in ["max_over_mean", "tiles_over_ideal", "forward_gb", "backward_gb", "busiest_mb", "plan_ms"]
        {
            assert!(line[key].as_f64().unwrap() > 0.0, "{key}");
        }
        let compared = ["forward_to_distca", "busiest_to_distca", "both_to_distca", "layer_to_distca"];
        assert!(compared.iter().all(|key| line.get(key).is_some()), "{line}");
    }
    let ratio =
        |line: &Value| line["forward_to_distca"].as_f64().unwrap() / line["forward_gb"].as_f64().unwrap();
    assert!((ratio(plans[0]) - 1.0 / 0.02).abs() < 1e-6, "whole plans to whole plans");
    assert!((ratio(plans[1]) - 4.0 / 0.02).abs() < 1e-6, "a lane to a quarter");
    let planned = ratio(plans[3]) / ratio(plans[2]);
    assert!(
        (planned - 4.0).abs() < 1e-6,
        "a lane of a plan made here is a quarter of the whole too: {planned}"
    );
    let rows: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "suite").collect();
    let starts = |row: &&Value, with| row["row"].as_str().unwrap().starts_with(with);
    assert!(["whole", "lane"].iter().all(|part| rows.iter().any(|row| starts(row, part))));
    assert!(rows.iter().all(|row| row["reached"].is_null() == row["pass"].is_null()));

    let words = outboard(&[&args[..], &["--only", "sec"]].concat());
    assert!(words.contains("second") && !words.contains("first") && words.contains("rows pass"), "{words}");
    std::fs::write(folder.path().join("distca.json"), "{}}").unwrap();
    assert!(outboard_fails(&args).contains("distca.json"));
    std::fs::write(folder.path().join("second.step.json"), "{\"model\": 1}").unwrap();
    std::fs::remove_file(folder.path().join("distca.json")).unwrap();
    assert!(outboard_fails(&args).contains("second.step.json"));
}

#[test]
fn the_plan_benchmark_chooses_homes_and_compares_with_those_of_the_step() {
    let folder = temporary_folder();
    let write =
        |name: &str, value: &Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let document = |id: u64, rank: u64, tokens: u64| json!({ "id": id, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let mut step = json!({
        "model": { "q_heads": 8, "kv_heads": 4, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 0, "rank": 0 }, { "id": 1, "rank": 1 }],
        "documents": [document(0, 0, 24000), document(1, 1, 8000), document(2, 1, 8000)],
    });
    write("tiny.step.json", &step);
    let args =
        ["bench", "plan", "--free-homes", "--steps", folder.path().to_str().unwrap(), "--repeats", "1"];
    let words = outboard(&[&args[..], &["--json", "-"]].concat());
    let lines: Vec<Value> = words.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let plans: Vec<&Value> = lines.iter().filter(|line| line["kind"] == "plan").collect();
    let name = |line: &Value| json!([line["step"], line["part"], line["homes"]]);
    for (line, part) in plans.iter().zip(["whole", "lane"]) {
        assert_eq!(name(line), json!(["tiny", part, "free"]), "{line}");
        let figure = |key: &str| line[key].as_f64().unwrap();
        assert!(
            figure("max_over_mean") <= 1.01 && (1.0..=1.02).contains(&figure("tokens_over_mean")),
            "{line}"
        );
        assert!(figure("split_documents") >= 1.0, "the long document fits no rank: {line}");
        assert!(line["layer_to_own"].as_array().unwrap().iter().all(|layer| layer.as_f64().unwrap() > 0.0));
        for key in ["forward_to_distca", "busiest_backward_to_distca", "both_to_own", "plan_ms"] {
            assert!(figure(key) > 0.0, "{key}");
        }
        assert!(line.get("layer_over_bound").is_none(), "bounds are of the step's own homes");
    }
    let rows: Vec<&str> = lines.iter().filter_map(|line| line["row"].as_str()).collect();
    for row in ["whole tokens/mean, worst step", "lane busiest link backward to DistCA"] {
        assert!(rows.contains(&row), "{rows:?}");
    }
    let words = outboard(&args);
    assert!(words.contains("tokens/mean") && words.contains("to own: over our plan"), "{words}");

    let refused = outboard_fails(&["bench", "plan", "--free-homes", "--growth"]);
    assert!(refused.contains("--free-homes") && refused.contains("--growth"), "{refused}");
    step["token_slack"] = json!(0.02);
    step["documents"][0].as_object_mut().unwrap().remove("home");
    write("tiny.step.json", &step);
    for args in [&args[..], &["bench", "plan", "--steps", args[4]]] {
        let refused = outboard_fails(args);
        assert!(
            refused.contains("tiny.step.json") && refused.contains("some documents have no home"),
            "{refused}"
        );
    }
}

#[test]
fn homes_are_chosen_for_documents_that_come_without() {
    let folder = temporary_folder();
    let step = folder.path().join("step.json");
    let step = step.to_str().unwrap();
    let tokens = [20_000, 3000, 9000, 500, 2500];
    let content = |slack: Option<f64>, pinned: bool| {
        let documents = (0u64..).zip(tokens).map(|(id, tokens)| match (id, pinned) {
            (4, true) => {
                json!({ "id": 50, "tokens": tokens, "home": [{ "rank": 2, "start": 0, "end": tokens }] })
            }
            _ => json!({ "id": 10 * id + 10, "tokens": tokens }),
        });
        let mut content = json!({
            "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
            "servers": [{ "id": 7, "rank": 0 }, { "id": 8, "rank": 1 }, { "id": 9, "rank": 2 }],
            "documents": documents.collect::<Vec<Value>>(),
        });
        if let Some(slack) = slack {
            content["token_slack"] = json!(slack);
        }
        std::fs::write(step, content.to_string()).unwrap();
    };
    for pinned in [false, true] {
        content(Some(0.02), pinned);
        let (plan, said) = outboard_says(&["plan", step, "--profile", "cpu"]);
        let plan: Value = serde_json::from_str(&plan).unwrap();
        let mut held = [0, 0, if pinned { 2500 } else { 0 }];
        let homes = plan["homes"].as_array().unwrap();
        assert_eq!(homes.len(), if pinned { 4 } else { 5 }, "only of those that came without");
        for (home, tokens) in homes.iter().zip(tokens) {
            let mut at = 0;
            for range in home["home"].as_array().unwrap() {
                assert_eq!(range["start"], at, "{home}");
                let end = range["end"].as_u64().unwrap();
                held[range["rank"].as_u64().unwrap() as usize] += end - at;
                at = end;
            }
            assert_eq!(at, tokens, "{home}");
        }
        assert!(held.iter().all(|&held| held as f64 <= 1.02 * 35_000.0 / 3.0), "{held:?}");
        // Every row has all of its keys once for each kv head.
        for (id, tokens) in [(10, 20_000), (50, 2500)] {
            let length = |range: &Value| range[1].as_u64().unwrap() - range[0].as_u64().unwrap();
            let cells = |task: &&Value| {
                let (q, kv) = (&task["q"], &task["kv"]);
                let seen =
                    |row: u64| (row + 1).min(kv[1].as_u64().unwrap()).saturating_sub(kv[0].as_u64().unwrap());
                let rows = q[0].as_u64().unwrap()..q[1].as_u64().unwrap();
                rows.map(seen).sum::<u64>() * length(&task["kv_heads"])
            };
            let tasks = plan["tasks"].as_array().unwrap().iter().filter(|task| task["document"] == id);
            let all: u64 = tasks.collect::<Vec<_>>().iter().map(cells).sum();
            assert_eq!(all, tokens * (tokens + 1));
        }
        let split = homes.iter().filter(|home| home["home"].as_array().unwrap().len() > 1).count();
        let most = *held.iter().max().unwrap() as f64 * 3.0 / 35_000.0;
        let chosen = homes.len();
        let line = format!(
            "{chosen} documents had their homes chosen, with a token slack of 0.02: tokens max / mean {most:.4}, {split} of 5 documents split"
        );
        for part in ["tokens / mean", "keys fetched", "rows fetched", &line] {
            assert!(said.contains(part), "{part:?} is missing in: {said}");
        }
        for policy in ["fixed", "wlb", "cp", "distca"] {
            let refused = outboard_fails(&["plan", step, "--policy", policy]);
            assert!(refused.contains("takes documents with homes, and some have none"), "{refused}");
        }
    }
    content(None, true);
    let refused = outboard_fails(&["plan", step]);
    assert!(refused.contains("(id 10) has no home") && refused.contains("token_slack"), "{refused}");
    for slack in [-0.1, 1.5] {
        content(Some(slack), false);
        let refused = outboard_fails(&["plan", step]);
        assert!(refused.contains(&format!("token_slack is {slack}")), "{refused}");
    }
}
