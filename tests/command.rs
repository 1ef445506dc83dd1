//! The command as a user runs it: processes, signals, exit codes, and what is printed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "pages have tests of their own")]
mod command_support;

use std::time::Duration;

use command_support::figures::sums;
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

/// What a run says before it starts.
fn forecast(lines: &[Value]) -> &Value {
    lines.iter().find(|line| line["kind"] == "forecast").expect("a run that forecasts its gain")
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
    let args = train(folder.path(), &["--steps", "3", "--placement", "fixed"]);
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
    let job = &lines[0];
    assert_eq!(
        (&job["kind"], &job["ranks"], &job["in_place"]),
        (&json!("job"), &json!(2), &json!(true)),
        "{job}"
    );
    let forecast = forecast(&lines);
    assert_eq!(forecast["steps"], json!(3));
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
        let forecast = forecast(&lines);
        assert_eq!(forecast["worth"], false);
        assert!(reason.contains(forecast["reason"].as_str().unwrap()), "{forecast}");
        assert_eq!(summary(&lines)["steps"], 1);
    };
    warned(&["--ranks", "1"], "one rank has nobody to share its attention with");
    if cores_of_their_own(2) {
        let slow = ["--link-bytes-per-second", "1000"];
        warned(&slow, "links are too slow to share attention evenly");
    }
}

#[test]
fn links_that_are_declared_slow_carry_nothing_and_losses_stay() {
    let run = |more: &[&str]| {
        let folder = temporary_folder();
        let args = train(folder.path(), &[&["--steps", "2"], more].concat());
        let (_, errors) = outboard_says(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert!(summary["max_relative_loss_difference"].as_f64().unwrap() < 1e-5, "{summary}");
        assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
        (summary["bytes_moved"].as_u64().unwrap(), forecast(&lines).clone(), errors)
    };
    let declared = |bytes| ["--flops-per-second", "1e9", "--bytes-per-second", bytes];
    let (usual, fast) = (run(&[]).0, run(&declared("1e12")).0);
    assert!(usual > 0 && fast > 0, "{usual} {fast}");
    let (moved, forecast, errors) = run(&declared("1"));
    assert_eq!(moved, 0);
    if cores_of_their_own(2) {
        // The prediction is of the plans that were made, which leave everything at home.
        assert_eq!((&forecast["kind"], &forecast["bytes_per_second"]), (&json!("forecast"), &json!(1.0)));
        assert!(forecast["gain"].as_f64().unwrap().abs() < 1e-9, "{forecast}");
        assert_eq!(forecast["reason"], "links are too slow to share attention evenly");
        assert!(errors.contains("a larger --bytes-per-second"), "{errors}");
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
            running.kill_with_tasks("attention server 1 ready");
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
    let cases: [(&[&str], &[&str]); 40] = [
        (&["train", "--data", empty], &[empty, "file"]),
        (&["train", "--data", "/nowhere/at/all"], &["/nowhere/at/all"]),
        (&["train", "--data", data, "--heads", "8", "--kv-heads", "3"], &["8", "3", "kv_heads"]),
        (&["train", "--data", data, "--head-dim", "998"], &["head_dim", "998", "256"]),
        (&["train", "--data", data, "--tokens", "0"], &["tokens"]),
        (&["train", "--data", data, "--dtype", "f64"], &["--dtype", "f64", "f32, bf16 or f16"]),
        (&["train", "--data", data, "--learning-rate", "NaN"], &["learning_rate", "NaN"]),
        (&["train", "--data", data, "--link-bytes-per-second", "0"], &["--link-bytes-per-second is 0"]),
        (
            &["train", "--data", data, "--flops-per-second", "1e9"],
            &["--flops-per-second is 1000000000", "--bytes-per-second is not given", "both"],
        ),
        (
            &["train", "--data", data, "--bytes-per-second", "5"],
            &["--bytes-per-second is 5", "--flops-per-second is not given", "both"],
        ),
        (
            &["train", "--data", data, "--flops-per-second", "inf", "--bytes-per-second", "5"],
            &["--flops-per-second is inf"],
        ),
        (
            &[
                "train",
                "--data",
                data,
                "--flops-per-second",
                "1",
                "--bytes-per-second",
                "5",
                "--attention",
                "local",
            ],
            &["--attention local", "leave out --flops-per-second"],
        ),
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
