//! `outboard simulate` as a user runs it: what it says, what it writes, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "nothing here starts servers")]
mod command_support;

use std::path::Path;

use command_support::markup::elements;
use command_support::{outboard, outboard_fails, outboard_says, read_json, temporary_folder};
use serde_json::{Value, json};

/// A small job: 4 ranks, a step of documents up to 16k.
const SMALL: [&str; 10] =
    ["--gpus", "32", "--context", "16k", "--tokens", "64k", "--steps", "1", "--seed", "3"];

/// The small job, where `more` says nothing else.
fn small<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let base = SMALL.chunks(2).filter(|pair| !more.contains(&pair[0])).flatten().copied();
    ["simulate"].into_iter().chain(base).chain(more.iter().copied()).collect()
}

/// The JSON lines of a small simulation.
fn lines(more: &[&str]) -> Vec<Value> {
    let text = outboard(&small(&[more, &["--json", "-"]].concat()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key} of {line}"))
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let file = folder.join(name);
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn by_default_all_policies_are_compared() {
    let text = outboard(&["simulate", "--steps", "1"]);
    assert!(text.contains("llama-8b, 64 h200, tensor 8"), "{text}");
    assert!(text.contains("context 524,288, 1,048,576 tokens a step, mix prolong"), "{text}");
    for policy in
        ["outboard", "outboard-fixed-homes", "fixed", "wlb", "cp", "cp-ring", "distca", "flexsp", "hdp"]
    {
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(policy));
        assert!(row.is_some(), "{policy}: {text}");
    }
    assert_eq!(text.matches(" baseline ").count(), 1, "{text}");
    assert_eq!(
        text.lines().filter(|line| line.contains(" * ") && !line.starts_with('*')).count(),
        1,
        "{text}"
    );
    assert!(text.contains("tuning: matmul_efficiency "), "{text}");
    assert!(text.contains("attention servers "), "{text}");
}

#[test]
fn a_line_has_what_was_simulated_and_what_came_of_it() {
    let lines = lines(&["--policy", "outboard,wlb"]);
    assert_eq!(lines.len(), 2);
    for (line, policy) in lines.iter().zip(["outboard", "wlb"]) {
        assert_eq!(line["kind"], "simulation");
        assert_eq!(line["policy"], policy);
        assert_eq!(
            (&line["model"], &line["gpu"], &line["mix"]),
            (&json!("llama-8b"), &json!("h200"), &json!("prolong"))
        );
        assert_eq!(
            (&line["gpus"], &line["context"], &line["tokens"]),
            (&json!(32), &json!(16384), &json!(65536))
        );
        let seconds = number(line, "step_seconds");
        assert!((number(line, "tokens_per_second") * seconds / 65536.0 - 1.0).abs() < 1e-12);
        assert!((0.0..1.0).contains(&number(line, "mfu")) && number(line, "imbalance") >= 1.0);
        let parts: f64 =
            line["account_seconds"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum();
        assert!((parts / seconds - 1.0).abs() < 1e-9, "parts {parts}, step {seconds}");
        assert!(number(&line["memory_bytes"], "total") <= number(&line["memory_bytes"], "available"));
        assert!(line["tuning"]["matmul_efficiency"].is_f64());
        assert_eq!(line["baseline"], "wlb");
    }
    let gain = number(&lines[1], "step_seconds") / number(&lines[0], "step_seconds") - 1.0;
    assert!((number(&lines[0], "gain") - gain).abs() < 1e-12);
    assert_eq!(number(&lines[1], "gain"), 0.0);
    assert_eq!(lines.iter().filter(|line| line["fastest"] == true).count(), 1);
}

#[test]
fn flags_count_for_more_than_the_file() {
    let folder = temporary_folder();
    write(folder.path(), "lengths.json", "[700, 16384, 300]");
    let text = "mix = \"lengths.json\"\ncontext = \"16k\"\ntokens = 65536\nsteps = 1\nseed = 9\npolicy = [\"wlb\", \"cp\"]\n\
                update = false\n[gpu]\nname = \"h100\"\nmemory_bytes = 70e9\n[layout]\ngpus = 16\ntensor = 4\n\
                [network.between]\nbytes_per_second = \"25GB/s\"\n[tuning]\nmatmul_efficiency = 0.5\n\
                [model]\nname = \"tiny\"\nlayers = 4\nhidden = 512\nffn = 1024\nq_heads = 8\nkv_heads = 4\nhead_dim = 64\nvocabulary = 1000\ndtype = \"bf16\"\n";
    let file = write(folder.path(), "job.toml", text);
    let run = |more: &[&str]| -> Vec<Value> {
        let text = outboard(&[&["simulate", "--config", &file, "--json", "-"], more].concat());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let lines = run(&[]);
    assert_eq!(lines.len(), 2);
    let line = &lines[0];
    let expected = [
        ("policy", json!("wlb")),
        ("mix", json!("lengths.json")),
        ("model", json!("tiny")),
        ("gpu", json!("h100")),
        ("gpus", json!(16)),
        ("tensor", json!(4)),
        ("update", json!(false)),
        ("link_between", json!(25e9)),
    ];
    for (key, value) in expected {
        assert_eq!(line[key], value, "{key}");
    }
    assert_eq!(line["memory_bytes"]["available"], 70e9);
    assert_eq!(line["tuning"]["matmul_efficiency"], 0.5);
    let flags = [
        "--gpus",
        "8",
        "--matmul-efficiency",
        "0.6",
        "--policy",
        "cp",
        "--no-update=false",
        "--mix",
        "prolong",
    ];
    let lines = run(&flags);
    assert_eq!(lines.len(), 1);
    assert_eq!(
        (&lines[0]["gpus"], &lines[0]["tensor"], &lines[0]["update"]),
        (&json!(8), &json!(4), &json!(true))
    );
    assert_eq!(lines[0]["tuning"]["matmul_efficiency"], 0.6);
    assert_eq!((&lines[0]["policy"], &lines[0]["mix"]), (&json!("cp"), &json!("prolong")));
}

#[test]
fn documents_of_a_file_come_in_its_order() {
    let folder = temporary_folder();
    // In order each sequence of 1,024 is one document; drawn, the documents of one token would shift the others.
    let file = write(folder.path(), "lengths.txt", "1024\n1024\n1024\n1024\n1\n");
    let run = |more: &[&str]| {
        let common =
            ["--gpus", "8", "--context", "1k", "--tokens", "2048", "--steps", "2", "--policy", "fixed"];
        let mix = ["--mix", &file];
        lines(&[&common[..], &mix, more].concat()).remove(0)
    };
    let in_order = run(&["--in-order"]);
    assert_eq!(in_order["mix"], "lengths.txt in order");
    assert_eq!(in_order["seconds_of_steps"][0], in_order["seconds_of_steps"][1], "{in_order}");
    assert_eq!(run(&["--in-order", "--seed", "5"])["seconds_of_steps"], in_order["seconds_of_steps"]);
    assert_eq!(run(&["--in-order=false"])["mix"], "lengths.txt");
    let refused = outboard_fails(&["simulate", "--in-order"]);
    assert!(refused.contains("name a file of lengths"), "{refused}");
}

#[test]
fn a_sweep_has_every_combination_in_order_whatever_the_threads() {
    let folder = temporary_folder();
    let csv = folder.path().join("results.csv");
    let sweep = ["--policy", "outboard,cp", "--sweep", "gpus=32,20,64 context=8k,16k"];
    let run = |threads: &str| {
        let files = ["--threads", threads, "--json", "-", "--csv", csv.to_str().unwrap()];
        let text = outboard(&small(&[&sweep[..], &files].concat()));
        (text, std::fs::read_to_string(&csv).unwrap())
    };
    let (json, columns) = run("1");
    assert_eq!((json.clone(), columns.clone()), run("3"));
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let order: Vec<(u64, u64)> = lines
        .iter()
        .step_by(2)
        .map(|line| (line["gpus"].as_u64().unwrap(), line["context"].as_u64().unwrap()))
        .collect();
    assert_eq!(order, [(32, 8192), (32, 16384), (20, 8192), (20, 16384), (64, 8192), (64, 16384)]);
    for line in &lines {
        // 20 GPUs are no multiple of 8 lanes: rows that say so.
        assert_eq!(line["error"].is_string(), line["gpus"] == 20, "{line}");
        assert_eq!(line["step_seconds"].is_null(), line["gpus"] == 20, "{line}");
    }
    let rows: Vec<&str> = columns.lines().collect();
    assert_eq!(rows.len(), 1 + lines.len());
    let names: Vec<&str> = rows[0].split(',').collect();
    for name in [
        "policy",
        "gpus",
        "tokens_per_second",
        "account_seconds.attention",
        "tuning.matmul_efficiency",
        "error",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let column = names.iter().position(|name| *name == "tokens_per_second").unwrap();
    assert_eq!(
        rows[1].split(',').nth(column).unwrap().parse::<f64>().unwrap(),
        number(&lines[0], "tokens_per_second")
    );
    assert_eq!(rows[1].split(',').count(), names.len());
    assert_eq!(outboard(&small(&[&sweep[..], &["--csv", "-"]].concat())), columns);
    let tuned = outboard(&small(&["--policy", "cp", "--sweep", "matmul-efficiency=0.4,0.5"]));
    assert!(tuned.contains("tuning: matmul_efficiency varies, "), "{tuned}");
    // The table has the swept columns and the reason.
    let table = outboard(&small(&sweep));
    assert!(table.contains("gpus") && table.contains("no multiple of tensor 8"), "{table}");
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let folder = temporary_folder();
    let file = folder.path().join("page.html");
    let cases: [&[&str]; 4] = [
        &["--policy", "outboard,wlb,distca,cp", "--sweep", "gpus=16,20,32 context=8k,16k"],
        &["--policy", "outboard"],
        &["--policy", "fixed", "--sweep", "seed=1"],
        &[
            "--policy",
            "outboard,cp",
            "--dedicated",
            "8",
            "--pipeline",
            "2",
            "--gpus",
            "40",
            "--micro-batches",
            "2",
        ],
    ];
    for (n, case) in cases.into_iter().enumerate() {
        outboard(&small(&[case, &["--html", file.to_str().unwrap()]].concat()));
        let page = std::fs::read_to_string(&file).unwrap();
        let elements = elements(&page).unwrap_or_else(|error| panic!("{case:?}: {error}"));
        for foreign in ["http:", "https:", "src=", "href=", "@import", "fetch("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        for nonsense in ["NaN", "inf", "-0."] {
            let texts = elements.iter().flat_map(|e| e.attributes.values().chain([&e.text]));
            let bad: Vec<&String> =
                texts.filter(|text| text.split([' ', ',']).any(|word| word == nonsense)).collect();
            assert!(bad.is_empty() && !page.contains("NaN"), "{case:?}: {bad:?}");
        }
        let ids: Vec<&str> =
            elements.iter().filter(|e| e.name == "section").map(|e| e.attributes["id"].as_str()).collect();
        let all = ["figures", "scale", "time", "memory", "gantt", "results", "parameters"];
        let expected = all.into_iter().filter(|id| *id != "scale" || n == 0);
        assert!(ids.iter().copied().eq(expected), "{case:?}: {ids:?}");
        // Devices of every kind, each drawn where it is.
        let rows: &[&str] = match n {
            0 => &["rank 0", "rank 3"],
            1 | 2 => &["rank 0", "rank 1"],
            _ => &["rank 0, stage 0", "rank 0, stage 1", "server 0"],
        };
        for row in rows {
            assert!(page.contains(&format!(">{row}</text>")), "{case:?}: {row}");
        }
        assert!(page.len() < 2_000_000, "{case:?}: {} bytes", page.len());
    }
}

#[test]
fn a_policy_that_cannot_do_it_is_a_row_with_its_reason() {
    // No GPU is left for the model, but where there are no servers all are ranks.
    let (text, _) = outboard_says(&small(&["--policy", "outboard,cp", "--dedicated", "32"]));
    let row =
        |policy: &str| text.lines().find(|line| line.split_whitespace().next() == Some(policy)).unwrap();
    assert!(row("outboard").ends_with("layout: 32 dedicated GPUs of 32 leave none for the model"), "{text}");
    assert!(row("cp").contains(" baseline "), "{text}");
    assert!(text.contains("attention servers cannot do it; cp is the fastest: "), "{text}");
    let crowded = ["--context", "256k", "--tokens", "256k", "--context-parallel", "2", "--gpus", "8"];
    let message = outboard_fails(&small(&crowded));
    assert!(message.contains("no policy can do it") && message.contains("layout"), "{message}");
}

#[test]
fn a_profile_stands_in_for_the_gpu() {
    let folder = temporary_folder();
    let grid = |direction: &str| {
        json!({ "direction": direction, "dtype": "bf16", "head_dim": 128, "rows": [16, 64], "keys": [16],
            "efficiency": [[0.25], [0.25]] })
    };
    let mut profile = json!({ "device": "some", "kernel_revision": "1", "peak_flops_per_second": 1e14,
        "grids": [grid("forward"), grid("backward")], "task_overhead_seconds": 0 });
    let file = write(folder.path(), "profile.json", &profile.to_string());
    let attention = |more: &[&str]| {
        number(&lines(&[&["--policy", "cp"], more].concat())[0]["account_seconds"], "attention")
    };
    assert!(attention(&["--profile", &file]) > 4.0 * attention(&[]));
    profile["grids"][1]["efficiency"] = json!([[0.25], []]);
    write(folder.path(), "profile.json", &profile.to_string());
    let message = outboard_fails(&small(&["--profile", &file]));
    assert!(message.contains("--profile") && message.contains("profile.grids[1].efficiency"), "{message}");
}

#[test]
fn same_input_same_bytes() {
    let folder = temporary_folder();
    let run = |name: &str| {
        let file = |ending: &str| folder.path().join(format!("{name}.{ending}")).to_str().unwrap().to_owned();
        let (html, csv, json) = (file("html"), file("csv"), file("json"));
        outboard(&small(&["--html", &html, "--csv", &csv, "--json", &json]));
        [html, csv, json].map(|file| std::fs::read(file).unwrap())
    };
    assert!(run("a") == run("b"));
    assert_eq!(read_json(&folder.path().join("a.json")).len(), 9);
}

#[test]
fn bad_input_is_refused_by_name() {
    let folder = temporary_folder();
    let missing = folder.path().join("missing.toml").to_str().unwrap().to_owned();
    let toml = |n: usize, text: &str| write(folder.path(), &format!("{n}.toml"), text);
    let typo = toml(0, "[layout]\ngups = 8\n");
    let table = toml(1, "[tunning]\nmatmul_efficiency = 0.5\n");
    let syntax = toml(2, "gpus = \n");
    let flat = toml(3, "gpus = 8\n");
    let shape = toml(4, "layers = 8\n");
    let shared = toml(5, "[layout]\ncontext = 2\n");
    let here = folder.path().to_str().unwrap();
    let unlike = format!("{here}/./page");
    let page = format!("{here}/page");
    let shapes = write(folder.path(), "model.json", "{\"name\": \"x\", \"layer\": 3}");
    let short = write(folder.path(), "lengths.txt", "100\n2000\n");
    let words = write(folder.path(), "words.txt", "100\nmany\n");
    let axis = |name: &str, to: u32| {
        format!("{name}={}", (1..=to).map(|n| n.to_string()).collect::<Vec<_>>().join(","))
    };
    let endless = format!("{} {}", axis("seed", 100), axis("steps", 100));
    let cases: [(&[&str], &[&str]); 33] = [
        (&["--model", "llama-7b"], &["--model", "`llama-7b`", "did you mean `llama-"]),
        (&["--model", &shapes], &["--model", "model.json", "`layer`", "did you mean `layers`?"]),
        (&["--gpu", "h20"], &["--gpu", "did you mean `h200`?"]),
        (&["--mix", "prolnog"], &["--mix", "did you mean `prolong`?"]),
        (&["--mix", &short], &["no document reaches the context of 16384", "2000"]),
        (&["--mix", &words], &["--mix", "line 2: `many`"]),
        (&["--policy", "distac"], &["--policy", "did you mean `distca`?"]),
        (&["--recompute", "all"], &["--recompute", "none, mlp, full"]),
        (&["--gpus", "x"], &["--gpus", "`x`"]),
        (&["--gpus", "36"], &["layout", "36 GPUs", "32 or 40"]),
        (&["--tensor", "3"], &["layout"]),
        (&["--pipeline", "3", "--gpus", "24"], &["pipeline 3", "32 layers"]),
        (&["--context-parallel", "3"], &["context parallelism 3 does not divide the 4 ranks"]),
        (&["--dedicated", "32", "--policy", "outboard"], &["32 dedicated GPUs"]),
        (&["--tokens", "8k"], &["tokens is 8192"]),
        (&["--link-between", "fast"], &["--link-between", "`fast`"]),
        (&["--link-between", "0"], &["network.between.bytes_per_second is 0"]),
        (&["--matmul-efficiency", "9"], &["tuning.matmul_efficiency is 9"]),
        (
            &["--context", "4m", "--tokens", "4m", "--gpu", "h100", "--policy", "outboard"],
            &["GB too much", "largest part is"],
        ),
        (&["--config", &missing], &["--config", "missing.toml"]),
        (&["--config", &typo], &["0.toml: layout.gups", "did you mean `layout.gpus`?"]),
        (&["--config", &table], &["1.toml: tunning", "did you mean `tuning`?"]),
        (&["--config", &syntax], &["2.toml"]),
        (&["--config", &flat], &["3.toml: gpus", "did you mean `layout.gpus`?"]),
        (&["--config", &shape], &["4.toml: layers", "did you mean `model.layers`?"]),
        (&["--config", &shared], &["5.toml: layout.context", "did you mean `layout.context_parallel`?"]),
        (&["--sweep", "gpu_count=8"], &["--sweep", "`gpu_count`"]),
        (&["--sweep", "gpus=8,many"], &["--sweep", "gpus=many", "`many`"]),
        (&["--html", "no/such/page.html"], &["--html no/such/page.html: there is no folder no/such"]),
        (&["--sweep", "gpus=8 seed=1,2", "--json", "x", "--csv", "x"], &["--json and --csv both name x"]),
        // Before anything is simulated: these are more points than anybody waits for.
        (&["--sweep", &endless, "--html", here], &["--html ", here, "directory"]),
        (&["--sweep", &endless, "--csv", here], &["--csv ", here, "directory"]),
        (&["--json", &page, "--html", &unlike], &["--json and --html both name "]),
    ];
    for (args, says) in cases {
        let message = outboard_fails(&small(args));
        for part in says {
            assert!(message.contains(part), "{args:?}: no {part:?} in {message}");
        }
    }
    assert!(!Path::new(&page).exists(), "what is refused writes nothing");
    let message =
        outboard_fails(&small(&["--sweep", &format!("{} {}", axis("seed", 101), axis("steps", 101))]));
    assert!(message.contains("10201 combinations are more than 10000"), "{message}");
}
