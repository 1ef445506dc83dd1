//! The page that `outboard plan --html` writes, read as a browser would.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "nothing here starts servers")]
mod command_support;

use command_support::markup::{Element, elements};
use command_support::{outboard, temporary_folder};
use serde_json::{Value, json};

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
fn a_document_that_spans_ranks_shows_who_holds_and_fetches_what() {
    let folder = temporary_folder();
    let step = folder.path().join("step.json");
    let content = json!({
        "model": { "q_heads": 4, "kv_heads": 2, "head_dim": 64, "bytes_per_element": 2 },
        "servers": [{ "id": 7, "rank": 0 }, { "id": 8, "rank": 1 }, { "id": 9, "rank": 2 }],
        "documents": [{ "id": 0, "tokens": 20_000 }, { "id": 1, "tokens": 5000 }, { "id": 2, "tokens": 5000 }],
        "token_slack": 0.05,
    });
    std::fs::write(&step, content.to_string()).unwrap();
    let (page, elements, plan) = page_of(&step, &[]);
    assert!(page.contains("3 documents had their homes chosen, with a token slack of 0.05: "), "{page}");
    let homes: Vec<&Vec<Value>> =
        plan["homes"].as_array().unwrap().iter().map(|home| home["home"].as_array().unwrap()).collect();
    let drawn = homes.iter().filter(|home| home.len() > 1);
    assert!(homes[0].len() > 1, "it fits no rank");
    assert_eq!(of_class(&elements, "strip").count(), drawn.clone().count());
    assert_eq!(of_class(&elements, "held").count(), drawn.map(|home| home.len()).sum::<usize>());
    let (_, fetched) = page.split_once("<title>rank ").unwrap();
    assert!(fetched.contains(": holds ") && fetched.contains("fetches "), "{fetched}");

    let rank = |id: u64, tokens: u64| json!({ "id": id, "tokens": tokens, "home": [{ "rank": id, "start": 0, "end": tokens }] });
    let mut with = content;
    with["documents"] = json!([rank(0, 20_000), rank(1, 5000), rank(2, 5000)]);
    std::fs::write(&step, with.to_string()).unwrap();
    let (page, elements, _) = page_of(&step, &[]);
    assert!(!page.contains("homes chosen") && of_class(&elements, "strip").next().is_none());
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
