//! The command as a user runs it: processes, signals, exit codes, and what is printed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod command_support;

use std::time::Duration;

use command_support::{
    Running, corpus, losses, outboard, outboard_fails, read_json, summary, temporary_folder,
};
use rustix::process::{Signal, test_kill_process};

/// Small enough for a test, large enough that every server gets tasks.
const SMALL: [&str; 6] = ["--tokens", "2048", "--layers", "2", "--dim", "64"];

fn train(folder: &std::path::Path, more: &[&str]) -> Vec<String> {
    let data = corpus(folder);
    let json = folder.join("figures.jsonl");
    let fixed = ["train", "--data", data.to_str().unwrap(), "--json", json.to_str().unwrap()];
    fixed.iter().chain(&SMALL).chain(more).map(|&arg| arg.to_owned()).collect()
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
    outboard(&train(folder.path(), &["--steps", "2", "--coordinator", &url]));
    let lines = read_json(&folder.path().join("figures.jsonl"));
    let summary = summary(&lines);
    assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
    for role in servers.into_iter().chain([coordinator]) {
        role.signal(Signal::TERM);
        role.expect_success();
    }
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
fn nonsense_is_refused_by_name_with_exit_code_2() {
    let folder = temporary_folder();
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let empty = empty.to_str().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let data = corpus(folder.path());
    let data = data.to_str().unwrap();
    let cases: [(&[&str], &[&str]); 11] = [
        (&["train", "--data", empty], &[empty, "file"]),
        (&["train", "--data", "/nowhere/at/all"], &["/nowhere/at/all"]),
        (&["train", "--data", data, "--heads", "8", "--kv-heads", "3"], &["8", "3", "kv_heads"]),
        (&["train", "--data", data, "--head-dim", "998"], &["head_dim", "998", "256"]),
        (&["train", "--data", data, "--tokens", "0"], &["tokens"]),
        (&["train", "--data", data, "--learning-rate", "NaN"], &["learning_rate", "NaN"]),
        (&["train", "--data", data, "--attention", "local", "--pool", "2"], &["--pool", "local"]),
        (&["train", "--data", data, "--coordinator", "http://127.0.0.1:1"], &["127.0.0.1:1", "coordinator"]),
        (&["coordinator", "--listen", &taken], &[&taken, "in use"]),
        (&["attention-server", "--listen", &taken], &[&taken, "in use"]),
        (
            &["attention-server", "--coordinator", "http://127.0.0.1:1"],
            &["127.0.0.1:1", "outboard coordinator"],
        ),
    ];
    for (args, parts) in cases {
        let message = outboard_fails(args);
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is missing in: {message}");
        }
    }
}
