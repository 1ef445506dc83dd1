//! `outboard train --placement` as a user runs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest")]
mod command_support;

use std::path::Path;

use command_support::{
    Running, corpus, losses, outboard, outboard_fails, read_json, summary, temporary_folder,
};
use serde_json::{Value, json};

fn train(folder: &Path, more: &[&str]) -> Vec<String> {
    let data = corpus(folder);
    let json = folder.join("figures.jsonl");
    let fixed = ["train", "--data", data.to_str().unwrap(), "--json", json.to_str().unwrap()];
    let small = ["--tokens", "2048", "--layers", "2", "--dim", "64"];
    let steps = if more.contains(&"--steps") { &[][..] } else { &["--steps", "3"] };
    fixed.iter().chain(&small).chain(steps).chain(more).map(|&arg| arg.to_owned()).collect()
}

/// A figure of all ranks.
fn all(line: &Value, key: &str) -> u64 {
    line["ranks"].as_array().unwrap().iter().map(|rank| rank[key].as_u64().unwrap()).sum()
}

#[test]
fn placed_tokens_train_as_documents_that_stay_where_they_are_dealt() {
    let run = || {
        let folder = temporary_folder();
        let words = outboard(&train(folder.path(), &["--ranks", "3", "--placement", "free"]));
        for said in ["tokens placed by the planner", "bytes of a step", "with fixed homes"] {
            assert!(words.contains(said), "{said} is missing in: {words}");
        }
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert_eq!(summary["placement"], "free");
        assert!(summary["max_relative_loss_difference"].as_f64().unwrap() < 1e-4, "{summary}");
        assert_eq!(summary["tasks_planned"], summary["tasks_computed"]);
        assert!((1.0..=1.02).contains(&summary["tokens_imbalance"].as_f64().unwrap()), "{summary}");
        let bytes = ["bytes_moved", "bytes_predicted", "bytes_with_fixed_homes"];
        let [moved, predicted, fixed] = bytes.map(|key| summary[key].as_u64().unwrap());
        assert!(fixed > 0 && moved >= predicted && (moved > 0) == (predicted > 0), "{summary}");
        for step in 0..3 {
            let of = |attention: &str| {
                lines.iter().find(|line| line["attention"] == attention && line["step"] == step).unwrap()
            };
            let (local, pool) = (of("local"), of("pool"));
            assert_eq!(all(local, "cells"), all(pool, "cells"));
            assert_eq!((&local["tokens"], &local["documents"]), (&pool["tokens"], &pool["documents"]));
        }
        (losses(&lines, "local"), losses(&lines, "pool"))
    };
    assert_eq!(run(), run());
}

#[test]
fn tokens_are_placed_where_ranks_have_servers_unless_they_are_fixed() {
    let run = |more: &[&str], expected: &str| {
        let folder = temporary_folder();
        let words = outboard(&train(folder.path(), more));
        assert!(words.contains("bytes of a step"), "{words}");
        assert_eq!(words.contains("fixed homes"), expected == "free", "{words}");
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert_eq!(summary["placement"], expected);
        let [moved, predicted] = ["bytes_moved", "bytes_predicted"].map(|key| summary[key].as_u64().unwrap());
        assert!(predicted > 0 && moved >= predicted, "{summary}");
        losses(&lines, "pool")
    };
    assert_eq!(run(&[], "free"), run(&["--placement", "free"], "free"));
    run(&["--pool", "2"], "fixed");
    run(&["--placement", "fixed"], "fixed");
}

#[test]
fn a_server_killed_among_placed_tokens_changes_no_bit() {
    let run = |kill: bool| {
        let folder = temporary_folder();
        let pool = ["--in-place", "--pool", "1", "--ranks", "3", "--steps", "12", "--attention", "pool"];
        let args = train(folder.path(), &[&["--placement", "free"], &pool[..]].concat());
        let mut running = Running::start(&args);
        if kill {
            running.kill_with_tasks("attention server 0 ready");
        }
        running.expect_success();
        let lines = read_json(&folder.path().join("figures.jsonl"));
        let summary = summary(&lines);
        assert_eq!((&summary["steps"], &summary["placement"]), (&json!(12), &json!("free")));
        assert_eq!(summary["tasks_resent"].as_u64().unwrap() >= 1, kill, "{summary}");
        assert_eq!(summary["servers_lost"], u64::from(kill));
        losses(&lines, "pool")
    };
    assert_eq!(run(false), run(true));
}

#[test]
fn placements_that_cannot_be_are_refused_by_name() {
    let folder = temporary_folder();
    let elsewhere = ["--coordinator", "http://192.0.2.1:4650", "--in-place", "--placement", "free"];
    let cases: [(&[&str], &[&str]); 7] = [
        (&elsewhere, &["--placement is free", "http://192.0.2.1:4650", "other hosts"]),
        (&["--placement", "some"], &["--placement", "some", "fixed", "free"]),
        (&["--placement", "free", "--attention", "local"], &["--placement is free", "--attention local"]),
        (&["--placement", "free", "--pool", "2"], &["--placement is free", "--in-place"]),
        (&["--placement", "fixed", "--token-slack", "0.1"], &["--token-slack is 0.1", "--placement free"]),
        (&["--placement", "free", "--token-slack", "1.5"], &["--token-slack is 1.5", "between 0 and 1"]),
        (&["--placement", "free", "--token-slack", "NaN"], &["--token-slack is NaN"]),
    ];
    for (more, parts) in cases {
        let args = train(folder.path(), more);
        let message = outboard_fails(&args.iter().map(String::as_str).collect::<Vec<_>>());
        for part in parts {
            assert!(message.contains(part), "{more:?}: {part:?} is missing in: {message}");
        }
    }
}
