//! One compute thread a rank: a process launched as the library says trains on a single thread, and two such
//! processes have the same bits.

use std::process::Command;

use outboard_trainer::{Exchange, LAUNCH_ENVIRONMENT, ModelConfig, TrainConfig, Trainer, require_one_thread};

use crate::support::{batch, naive};

const MARK: &str = "trained: ";

/// Tells the process that the test below starts from the test run itself.
const CHILD: &str = "OUTBOARD_TEST_RANK";

/// The work of that process.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    require_one_thread().unwrap();
    // Wide enough that candle would split its products and loops; documents short enough for naive attention.
    let config = TrainConfig { tokens: 2048, ranks: 1, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&ModelConfig::default(), &config, naive()).unwrap();
    let mut exchange = Exchange::alone();
    let bits: Vec<String> = (0..2)
        .map(|step| {
            trainer.step(&batch(step, 0, &[32; 64]), &mut exchange).unwrap().loss.to_bits().to_string()
        })
        .collect();
    let mut threads: Vec<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap().trim().to_string())
        .collect();
    threads.sort();
    println!("{MARK}{} on {}", bits.join(" "), threads.join(","));
}

#[cfg(target_os = "linux")]
#[test]
fn a_launched_rank_computes_on_one_thread_with_the_same_bits() {
    let run = || {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "threads::child", "--nocapture", "--test-threads", "1"])
            .envs(LAUNCH_ENVIRONMENT)
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        text.split_once(MARK).unwrap().1.lines().next().unwrap().to_string()
    };
    let first = run();
    assert_eq!(first, run());
    // With one test thread the harness may run the test on its main thread or beside it; nobody else computes.
    let (_, threads) = first.split_once(" on ").unwrap();
    assert!(threads.split(',').count() <= 2, "{threads}");
}
