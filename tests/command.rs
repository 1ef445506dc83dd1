//! The command as a user runs it: processes, signals, exit codes, and what is printed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod command_support;

use std::time::Duration;

use command_support::figures::sums;
use command_support::markup::{Element, elements};
use command_support::{
    Running, corpus, losses, outboard, outboard_fails, outboard_says, read_json, summary, temporary_folder,
};
use rustix::process::{Signal, test_kill_process};
use serde_json::{Value, json};

/// Small enough for a test, large enough that every server gets tasks.
const SMALL: [&str; 6] = ["--tokens", "2048", "--layers", "2", "--dim", "64"];

fn train(folder: &std::path::Path, more: &[&str]) -> Vec<String> {
    let data = corpus(folder);
    let json = folder.join("figures.jsonl");
    let fixed = ["train", "--data", data.to_str().unwrap(), "--json", json.to_str().unwrap()];
    fixed.iter().chain(&SMALL).chain(more).map(|&arg| arg.to_owned()).collect()
}

/// Whether so many ranks or servers have a core each.
fn cores_of_their_own(owners: usize) -> bool {
    rustix::thread::sched_getaffinity(None).unwrap().count() as usize >= owners
}

#[test]
fn the_main_job_agrees_with_local_attention_and_repeats_its_bits() {
    let run = || {
        let folder = temporary_folder();
        let words = outboard(&train(folder.path(), &["--steps", "4"]));
        assert!(words.contains("speedup") && words.contains("core attention"), "{words}");
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert!(summary["max_relative_loss_difference"].as_f64().unwrap() < 1e-4);
        assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
        assert!(summary["tasks_planned"].as_u64().unwrap() > 0);
        assert_eq!(summary["tasks_resent"], 0);
        assert!(summary["bytes_moved"].as_u64().unwrap() > 0);
        let after =
            lines.iter().filter(|l| l["attention"] == "pool").map(|l| l["imbalance_after"].as_f64().unwrap());
        assert!(after.fold(0.0, f64::max) < 1.1);
        assert_eq!(losses(&lines, "local").len(), 4);
        (losses(&lines, "local"), losses(&lines, "pool"))
    };
    assert_eq!(run(), run());
}

#[test]
fn figures_of_a_run_follow_from_its_step_lines() {
    let folder = temporary_folder();
    let args = train(folder.path(), &["--steps", "3"]);
    let (words, errors) = outboard_says(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let lines = read_json(&folder.path().join("figures.jsonl"));
    let (summary, sums) = (summary(&lines), sums(&lines));
    let expected = [
        ("ideal_speedup", sums.local / sums.ideal),
        ("wlb_speedup", sums.local / sums.wlb),
        ("wlb_token_imbalance", sums.wlb_token_imbalance),
        ("local_step_seconds", sums.local / sums.steps),
        ("predicted_step_seconds", sums.predicted / sums.steps),
        ("measured_step_seconds", sums.measured / sums.steps),
        ("imbalance", sums.imbalance),
    ];
    let cores_of_their_own = cores_of_their_own(2);
    for (key, value) in expected {
        if key == "predicted_step_seconds" && !cores_of_their_own {
            assert!(summary.get(key).is_none(), "{summary}");
            continue;
        }
        let printed = summary[key].as_f64().unwrap_or_else(|| panic!("no {key} in {summary}"));
        assert!(printed > 0.0 && (printed / value - 1.0).abs() < 1e-9, "{key}: {printed}, not {value}");
    }
    let rows = ["| local ", "| wlb (predicted) ", "| pool (predicted) ", "| pool "];
    let rows: Vec<&str> =
        rows.into_iter().filter(|row| cores_of_their_own || *row != "| pool (predicted) ").collect();
    let starts: Vec<&str> =
        words.lines().filter_map(|line| rows.iter().find(|row| line.starts_with(*row))).copied().collect();
    assert_eq!(starts, rows, "{words}");

    if !cores_of_their_own {
        assert!(words.contains("no gain is predicted: ranks and servers share cores"), "{words}");
        return;
    }
    let first = words.lines().next().unwrap();
    assert!(first.starts_with("balancing attention over 2 ranks is predicted to "), "{words}");
    assert!(
        words.contains("step of the slowest rank: ") && words.contains(" as the plans predict, "),
        "{words}"
    );
    let forecast = &lines[0];
    assert_eq!((&forecast["kind"], &forecast["steps"]), (&json!("forecast"), &json!(3)));
    let number = |key: &str| forecast[key].as_f64().unwrap_or_else(|| panic!("no {key} in {forecast}"));
    assert!((number("imbalance") / sums.imbalance - 1.0).abs() < 1e-9, "{forecast}, not {}", sums.imbalance);
    assert!(number("gain") <= number("ideal_gain") && number("ideal_gain") < 1.0, "{forecast}");
    let share = number("attention_share");
    assert!(share > 0.0 && share < 1.0, "{forecast}");
    assert!(["attention_flops_per_second", "rest_flops_per_second"].iter().all(|key| number(key) > 0.0));
    let worth = forecast["worth"].as_bool().unwrap();
    assert_eq!((worth, forecast.get("reason").is_none()), (number("gain") >= 0.02, worth), "{forecast}");
    assert_eq!(errors.contains("not worth disaggregating"), !worth, "{errors}");
}

#[test]
fn a_job_that_gains_nothing_is_warned_and_trained() {
    let warned = |more: &[&str], reason: &str| {
        let folder = temporary_folder();
        let args = train(folder.path(), &[&["--steps", "1"], more].concat());
        let (_, errors) = outboard_says(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let warnings: Vec<&str> =
            errors.lines().filter(|line| line.starts_with("outboard: warning: ")).collect();
        assert_eq!(warnings.len(), 1, "{more:?}: {errors}");
        assert!(warnings[0].contains("not worth disaggregating") && warnings[0].contains(reason), "{errors}");
        let lines = read_json(&folder.path().join("figures.jsonl"));
        assert_eq!(lines[0]["worth"], false);
        assert!(reason.contains(lines[0]["reason"].as_str().unwrap()), "{}", lines[0]);
        assert_eq!(summary(&lines)["steps"], 1);
    };
    warned(&["--ranks", "1"], "one rank has nobody to share its attention with");
    if cores_of_their_own(2) {
        let slow = ["--link-bytes-per-second", "1000"];
        warned(&slow, "links are too slow for what the plans move");
    }
}

#[test]
fn attention_is_served_in_half_the_bits() {
    let run = |dtype: &str| {
        let folder = temporary_folder();
        let words = outboard(&train(folder.path(), &["--steps", "2", "--dtype", dtype]));
        assert!(
            words.contains(&format!("-{dtype}-"))
                && words.contains(&format!("dO of core attention in {dtype}")),
            "{words}"
        );
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines).clone();
        assert_eq!(summary["dtype"], dtype);
        assert!(summary["max_relative_loss_difference"].as_f64().unwrap() < 1e-5, "{summary}");
        assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
        (summary["loss_last"].as_f64().unwrap(), summary["bytes_moved"].as_u64().unwrap())
    };
    let (of_f32, of_bf16, of_f16) = (run("f32"), run("bf16"), run("f16"));
    for (loss, bytes) in [of_bf16, of_f16] {
        let apart = (loss / of_f32.0 - 1.0).abs();
        assert!(apart > 0.0 && apart < 1e-2, "{loss} {of_f32:?}: nothing was rounded, or too much");
        assert!(bytes < of_f32.1, "{bytes} {of_f32:?}");
    }
}

#[test]
fn a_server_killed_with_tasks_in_hand_changes_no_bit() {
    let run = |kill: bool| {
        let folder = temporary_folder();
        let args = train(folder.path(), &["--steps", "12", "--pool", "3", "--attention", "pool"]);
        let mut running = Running::start(&args);
        if kill {
            let pid = running.pid_of("attention server 1 ready");
            running.wait_for("step   0");
            // Stopped, it takes tasks and answers none; then it dies with them.
            rustix::process::kill_process(pid, Signal::STOP).unwrap();
            std::thread::sleep(Duration::from_secs(2));
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
        }
        running.expect_success();
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert_eq!(summary["steps"], 12);
        assert_eq!(summary["tasks_resent"].as_u64().unwrap() >= 1, kill, "{summary}");
        assert_eq!(summary["servers_lost"], u64::from(kill));
        losses(&lines, "pool")
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn the_roles_run_apart() {
    let mut coordinator = Running::start(&["coordinator", "--listen", "127.0.0.1:0", "--json"]);
    let url = format!("http://{}", coordinator.ready_address());
    let server = ["attention-server", "--coordinator", &url, "--json", "--threads", "1"];
    let mut servers = [Running::start(&server), Running::start(&server)];
    for server in &mut servers {
        server.ready_address();
    }
    let folder = temporary_folder();
    let words = outboard(&train(folder.path(), &["--steps", "2", "--coordinator", &url]));
    assert!(
        words.contains("no gain is predicted: how fast the servers of an outside pool compute is not known"),
        "{words}"
    );
    let lines = read_json(&folder.path().join("figures.jsonl"));
    let summary = summary(&lines);
    assert!(summary.get("predicted_step_seconds").is_none(), "{summary}");
    assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
    for role in servers.into_iter().chain([coordinator]) {
        role.signal(Signal::TERM);
        role.expect_success();
    }
}

#[test]
fn without_a_gpu_only_auto_starts_and_says_why_the_cpu_computes() {
    let why = if cfg!(feature = "cuda") { "NVIDIA driver" } else { "--features cuda" };
    let folder = temporary_folder();
    let train: Vec<String> = train(folder.path(), &["--steps", "1", "--device", "cuda:0"]);
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    for args in [
        &["attention-server", "--device", "cuda:0"][..],
        &["attention-server", "--device", "cuda:all"],
        &["profile", "--device", "cuda:0"],
        &["bench", "kernel", "--device", "cuda:0", "--suite"],
        &train[..],
    ] {
        let message = outboard_fails(args);
        assert!(message.contains(why), "{args:?}: {message}");
    }
    let server = ["attention-server", "--json", "--end-with-stdin", "--device", "auto"];
    let (ready, said) = outboard_says(&server);
    assert!(said.lines().count() == 1 && said.contains(why) && said.contains("the CPU computes"), "{said}");
    let ready: Value = serde_json::from_str(&ready).unwrap();
    assert_eq!(ready["device"], "cpu");
    assert!(ready["threads"].as_u64().unwrap() > 0);
    let (_, said) = outboard_says(&server[..3]);
    assert_eq!(said, "", "nothing is said where the CPU was asked for");
}

#[test]
fn no_process_outlives_the_run() {
    for signal in [Signal::INT, Signal::KILL] {
        let folder = temporary_folder();
        let mut running = Running::start(&train(folder.path(), &["--steps", "1000", "--pool", "2"]));
        let pids = [running.pid_of("attention server 0 ready"), running.pid_of("rank 1 on cores")];
        running.wait_for("step   0");
        running.signal(signal);
        let status = running.wait();
        assert!(!status.success());
        for pid in pids {
            let gone = (0..100).any(|_| {
                std::thread::sleep(Duration::from_millis(100));
                // A process that nobody has reaped yet is gone all the same.
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
                test_kill_process(pid).is_err() || stat.is_ok_and(|stat| stat.contains(") Z "))
            });
            assert!(gone, "process {pid:?} still runs after {signal:?}");
        }
    }
}

#[test]
fn the_kernel_benchmark_says_what_it_measured() {
    let shape = ["--tokens", "96", "--queries", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"];
    let how =
        ["--dtype", "f32,bf16,f16", "--mask", "sink-window:4:9", "--simd", "portable", "--threads", "1"];
    let args = ["bench", "kernel", "--repeats", "1", "--json", "-"];
    let words = outboard(&[&args[..], &shape, &how].concat());
    let lines: Vec<Value> = words.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut measured = Vec::new();
    for line in lines.iter().filter(|line| line["kind"] == "kernel") {
        let expected = json!({ "mask": "sink-window:4:9", "n_q": 32, "n_kv": 96, "q_heads": 4, "kv_heads": 2,
            "head_dim": 16, "threads": 1, "isa": "portable" });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&line[key], value, "{key}");
        }
        for key in ["gflops", "fraction_of_peak"] {
            assert!(line[key].as_f64().is_some(), "{key}");
        }
        measured.push((line["dtype"].as_str().unwrap(), line["direction"].as_str().unwrap()));
    }
    let both = |dtype| [(dtype, "forward"), (dtype, "backward")];
    assert_eq!(measured, [both("f32"), both("bf16"), both("f16")].concat());
    let peaks = lines.iter().filter(|line| line["kind"] == "peak" && line["clock_ghz"].as_f64().is_some());
    assert_eq!(peaks.count(), 3);
}

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

/// The page that shows the plan of a step, its elements, and the plan.
fn page_of(step: &std::path::Path, more: &[&str]) -> (String, Vec<Element>, Value) {
    let file = step.with_extension("html");
    let args = ["plan", step.to_str().unwrap(), "--html", file.to_str().unwrap()];
    let plan = serde_json::from_str(&outboard(&[&args[..], more].concat())).unwrap();
    let page = std::fs::read_to_string(file).unwrap();
    let elements = elements(&page).unwrap();
    // All that it needs is in it.
    for foreign in ["http:", "https:", "src=", "href=", "@import", "fetch("] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    (page, elements, plan)
}

fn of_class<'a>(elements: &'a [Element], class: &'a str) -> impl Iterator<Item = &'a Element> {
    let has = move |e: &&Element| {
        e.attributes.get("class").is_some_and(|classes| classes.split(' ').any(|one| one == class))
    };
    elements.iter().filter(has)
}

#[test]
fn a_plan_is_shown_as_one_page() {
    let folder = temporary_folder();
    let step = folder.path().join("a <b> & \"c'.json");
    let document = |rank: u64, tokens: u64| json!({ "id": 40 + rank, "tokens": tokens, "home": [{ "rank": rank, "start": 0, "end": tokens }] });
    let content = json!({
        "model": { "q_heads": 2, "kv_heads": 1, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 7, "rank": 0 }, { "id": 9, "rank": 1 }],
        "documents": [document(0, 9001), document(1, 1)],
    });
    std::fs::write(&step, content.to_string()).unwrap();
    let (page, elements, plan) = page_of(&step, &[]);
    let without: Value = serde_json::from_str(&outboard(&["plan", step.to_str().unwrap()])).unwrap();
    assert_eq!(plan["tasks"], without["tasks"], "the page does not change the plan");
    assert!(page.contains("<h1>Who computes what: a &lt;b&gt; &amp; &quot;c&#39;.json</h1>"));
    let tasks = plan["tasks"].as_array().unwrap();
    let end = |task: &Value, range: &str, end: usize| task[range][end].as_u64().unwrap();
    let cells_of = |server: u64| {
        let own = tasks.iter().filter(|task| task["server"] == server);
        let rows = |task: &Value| end(task, "q", 0)..end(task, "q", 1);
        own.flat_map(rows).map(|row| row + 1).sum::<u64>() as f64
    };
    let (seven, nine) = (cells_of(7), cells_of(9));
    let mean = (seven + nine) / 2.0;
    assert_eq!(seven + nine, 9001.0 * 9002.0 / 2.0 + 1.0);
    let values: Vec<&str> = of_class(&elements, "value").map(|value| value.text.as_str()).collect();
    assert_eq!(values[0], format!("2.000 → {:.4}", seven.max(nine) / mean));
    assert!(values.contains(&format!("{} tasks", tasks.len()).as_str()), "{values:?}");
    let bars = of_class(&elements, "before").filter(|bar| bar.name == "rect").count();
    assert_eq!(bars, 2, "one for each server");
    // One home lends to one server: a place of the map, and the ten shades of its key.
    assert_eq!(of_class(&elements, "heat").count(), 1 + 10);
    let areas: Vec<&Element> = of_class(&elements, "area").collect();
    assert_eq!(areas.len(), tasks.len());
    for server in [7, 9] {
        let shown = areas.iter().filter(|area| area.attributes["data-server"] == server.to_string());
        assert_eq!(shown.count(), tasks.iter().filter(|task| task["server"] == server).count());
    }
}

#[test]
fn every_kind_of_step_has_a_page() {
    let folder = temporary_folder();
    let step = folder.path().join("step.json");
    let homes = |ranks: u64, tokens: u64| {
        let home =
            |n: u64| json!({ "rank": n, "start": n * tokens / ranks, "end": (n + 1) * tokens / ranks });
        (0..ranks).map(home).collect::<Vec<Value>>()
    };
    let servers = |from: u64, n: u64, in_place: bool| {
        let server =
            |id: u64| json!({ "id": id, "rank": in_place.then_some(id), "speed": 1.0 + id as f64 / 7.0 });
        (from..from + n).map(server).collect::<Vec<Value>>()
    };
    let window = json!([{ "q": [0, 300], "kv": [0, 300], "lo": -20, "hi": 0, "kv_heads": [0, 1] },
        { "q": [10, 20], "kv": [30, 40], "kv_heads": [1, 2] }]);
    // A band that its rectangle misses.
    let none = json!([{ "q": [0, 1], "kv": [5, 6], "hi": 0 }]);
    let cases = [
        (servers(0, 1, true), json!([{ "id": 0, "tokens": 1, "home": homes(1, 1) }])),
        (servers(5, 3, false), json!([{ "id": 0, "tokens": 300, "home": homes(3, 300), "mask": window }])),
        (servers(0, 700, true), json!([{ "id": u64::MAX, "tokens": 9000, "home": homes(70, 9000) }])),
        (
            servers(0, 4, true),
            json!([{ "id": 1, "tokens": 900, "home": homes(2, 900), "tick": 3 },
                { "id": 2, "tokens": 500, "home": homes(1, 500), "tick": 4 }, { "id": 3, "tokens": 2, "home": homes(2, 2) }]),
        ),
        (servers(0, 2, true), json!([{ "id": 0, "tokens": 9, "home": homes(1, 9), "mask": none }])),
    ];
    for (servers, documents) in cases {
        let model = json!({ "q_heads": 4, "kv_heads": 2, "head_dim": 8, "bytes_per_element": 4 });
        let content =
            json!({ "model": model, "servers": servers, "documents": documents, "bytes_per_second": 1e9 });
        std::fs::write(&step, content.to_string()).unwrap();
        for policy in [
            &[][..],
            &["--tolerance", "0"],
            &["--policy", "fixed"],
            &["--policy", "cp"],
            &["--policy", "distca"],
        ] {
            let (page, elements, _) = page_of(&step, policy);
            assert_eq!(elements.iter().filter(|e| e.name == "section").count(), 5, "{policy:?}");
            assert!(page.contains("at the step&#39;s 1 GB/s and, by default, 400 TFLOP/s"));
            for nonsense in ["NaN", "inf", "-0."] {
                let bad = elements.iter().flat_map(|e| e.attributes.values().chain([&e.text]));
                let bad: Vec<&String> =
                    bad.filter(|text| text.split(' ').any(|word| word == nonsense)).collect();
                assert!(bad.is_empty() && !page.contains("NaN"), "{policy:?}: {bad:?}");
            }
        }
    }
}

#[test]
fn the_check_of_pages_finds_what_is_wrong() {
    let page = |body: &str| elements(&format!("<!DOCTYPE html>\n<html>{body}</html>\n"));
    assert_eq!(page("<p id=\"a\">1 &lt; 2<br/></p><style>a>b{}</style>").unwrap().len(), 4);
    for wrong in
        ["<p>", "</p>", "<p><b></p></b>", "<p id=a></p>", "<p a=\"\" a=\"\"></p>", "a & b", "<1>", "<style>"]
    {
        assert!(page(wrong).is_err(), "{wrong}");
    }
    assert!(elements("<html></html>").is_err() && elements("<!DOCTYPE html><p></p>text").is_err());
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
fn nonsense_is_refused_by_name_with_exit_code_2() {
    let folder = temporary_folder();
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = empty.to_str().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let data = corpus(folder.path());
    let data = data.to_str().unwrap();
    let step = folder.path().join("step.json");
    let content = json!({
        "model": { "q_heads": 1, "kv_heads": 1, "head_dim": 8, "bytes_per_element": 2 },
        "servers": [{ "id": 0, "rank": 0 }],
        "documents": [{ "id": 0, "tokens": 9, "home": [{ "rank": 0, "start": 0, "end": 9 }] }],
    });
    std::fs::write(&step, content.to_string()).unwrap();
    let step = step.to_str().unwrap();
    let cases: [(&[&str], &[&str]); 36] = [
        (&["train", "--data", empty], &[empty, "file"]),
        (&["train", "--data", "/nowhere/at/all"], &["/nowhere/at/all"]),
        (&["train", "--data", data, "--heads", "8", "--kv-heads", "3"], &["8", "3", "kv_heads"]),
        (&["train", "--data", data, "--head-dim", "998"], &["head_dim", "998", "256"]),
        (&["train", "--data", data, "--tokens", "0"], &["tokens"]),
        (&["train", "--data", data, "--dtype", "f64"], &["--dtype", "f64", "f32, bf16 or f16"]),
        (&["train", "--data", data, "--learning-rate", "NaN"], &["learning_rate", "NaN"]),
        (&["train", "--data", data, "--link-bytes-per-second", "0"], &["--link-bytes-per-second is 0"]),
        (&["train", "--data", data, "--attention", "local", "--pool", "2"], &["--pool", "local"]),
        (&["train", "--data", data, "--coordinator", "http://127.0.0.1:1"], &["127.0.0.1:1", "coordinator"]),
        (&["train", "--data", data, "--device", "cuda:all"], &["--device", "cuda:all", "cuda:N"]),
        (
            &["train", "--data", data, "--device", "cuda:0", "--attention", "local"],
            &["cuda:0", "--attention local"],
        ),
        (&["train", "--data", data, "--device", "cuda:0", "--in-place"], &["cuda:0", "--in-place"]),
        (&["train", "--data", data, "--device", "cuda:0", "--dtype", "f32"], &["cuda:0", "f32", "bf16"]),
        (&["attention-server", "--device", "gpu"], &["--device", "gpu", "cuda:all", "auto"]),
        (&["attention-server", "--device", "cuda:0", "--threads", "2"], &["--threads", "cuda:0"]),
        (&["attention-server", "--device", "cuda:all", "--isa", "portable"], &["--isa", "cuda:all"]),
        (&["coordinator", "--listen", &taken], &[&taken, "in use"]),
        (&["attention-server", "--listen", &taken], &[&taken, "in use"]),
        (
            &["attention-server", "--coordinator", "http://127.0.0.1:1"],
            &["127.0.0.1:1", "outboard coordinator"],
        ),
        (&["bench", "kernel", "--mask", "windw:4"], &["--mask", "windw:4", "window:W"]),
        (&["bench", "kernel", "--dtype", "f64"], &["--dtype", "f64", "bf16"]),
        (&["bench", "kernel", "--tokens", "16", "--queries", "17"], &["--queries 17", "16"]),
        (&["bench", "kernel", "--tokens", "0"], &["--tokens 0"]),
        (&["bench", "kernel", "--tokens", "1000000000", "--heads", "4096"], &["GiB", "memory"]),
        (&["bench", "kernel", "--threads", "100000"], &["--threads 100000", "core"]),
        (&["bench", "kernel", "--softcap", "-1"], &["softcap", "-1"]),
        (&["bench", "kernel", "--suite", "--only", "no such row"], &["--only", "no such row"]),
        (&["plan", step, "--html", "/nowhere/page.html"], &["cannot write /nowhere/page.html"]),
        (&["plan", step, "--html", empty], &["cannot write", empty]),
        (&["plan", step, "--html", "/nowhere/a", "-o", "/nowhere/a"], &["--html and --output", "/nowhere/a"]),
        (&["bench", "plan", "--steps", empty], &[empty, "*.step.json"]),
        (&["bench", "plan", "--steps", "/nowhere/at/all"], &["/nowhere/at/all"]),
        (&["bench", "plan", "--only", "no such step"], &["--only", "no such step"]),
        (&["bench", "plan", "--repeats", "0"], &["--repeats", "0"]),
        (&["profile", "--rows", "0"], &["--rows 0"]),
    ];
    for (args, parts) in cases {
        let message = outboard_fails(args);
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is missing in: {message}");
        }
    }
}
