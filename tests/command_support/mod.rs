//! Runs the command and reads what it prints. A process still running when its handle is dropped is killed.
#![allow(unreachable_pub, reason = "a module of a test binary")]

pub mod figures;
pub mod markup;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;

/// How long anything may take before it counts as hanging.
const LIMIT: Duration = Duration::from_secs(120);

/// A folder that is removed with its handle.
pub struct TemporaryFolder(PathBuf);

/// A process whose lines are read as it prints them.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl TemporaryFolder {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn temporary_folder() -> TemporaryFolder {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("outboard-test-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    TemporaryFolder(path)
}

/// Documents of long-tailed lengths, some longer than a rank's tokens.
pub fn corpus(folder: &Path) -> PathBuf {
    let data = folder.join("data");
    std::fs::create_dir_all(&data).unwrap();
    for n in 0..40u32 {
        let lines = if n % 7 == 0 { 120 } else { 3 + n % 11 };
        let mut text = String::new();
        for line in 0..lines {
            writeln!(text, "line {line} of document {n}: attention is served from outboard").unwrap();
        }
        std::fs::write(data.join(format!("{n:02}.txt")), text).unwrap();
    }
    data
}

fn command(args: &[impl AsRef<str>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outboard"));
    command.args(args.iter().map(AsRef::as_ref));
    // What these tests say does not depend on the machine's GPUs: there are none.
    command.env("CUDA_VISIBLE_DEVICES", "");
    command
}

/// Runs to a successful end and gives what it printed.
pub fn outboard(args: &[impl AsRef<str>]) -> String {
    let output = command(args).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {error}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Runs to a successful end without input, and gives what it printed to standard output and error.
pub fn outboard_says(args: &[&str]) -> (String, String) {
    let output = command(args).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {}: {error}", output.status);
    (String::from_utf8(output.stdout).unwrap(), error)
}

/// Runs to a failure with exit code 2 and gives what it printed to standard error.
pub fn outboard_fails(args: &[&str]) -> String {
    let output = command(args).stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    error
}

pub fn read_json(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn summary(lines: &[Value]) -> &Value {
    lines.iter().find(|line| line["kind"] == "summary").unwrap()
}

/// The bits of a training's losses, step by step.
pub fn losses(lines: &[Value], attention: &str) -> Vec<u64> {
    let steps = lines.iter().filter(|line| line["kind"] == "step" && line["attention"] == attention);
    steps.map(|line| line["loss"].as_f64().unwrap().to_bits()).collect()
}

impl Running {
    pub fn start(args: &[impl AsRef<str>]) -> Running {
        let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Running { child, lines, seen: Vec::new() }
    }

    /// The first line that starts with `start`, printed already or awaited.
    pub fn wait_for(&mut self, start: &str) -> String {
        if let Some(line) = self.seen.iter().find(|line| line.starts_with(start)) {
            return line.clone();
        }
        loop {
            let line = self.lines.recv_timeout(LIMIT).unwrap_or_else(|e| {
                panic!("no line starts with {start:?} ({e}); there were {:#?}", self.seen)
            });
            self.seen.push(line.clone());
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// The process id that the line which starts with `start` names.
    pub fn pid_of(&mut self, start: &str) -> Pid {
        let line = self.wait_for(start);
        let pid = line.split("pid ").nth(1).unwrap().split([' ', ',']).next().unwrap();
        Pid::from_raw(pid.parse().unwrap()).unwrap()
    }

    /// Kills a process whose line starts so, with tasks in hand: stopped, it takes tasks and answers none; then it dies with
    /// them.
    pub fn kill_with_tasks(&mut self, start: &str) {
        let pid = self.pid_of(start);
        self.wait_for("step   0");
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }

    /// The address of a role's ready line.
    pub fn ready_address(&mut self) -> String {
        let line = self.wait_for(r#"{"#);
        let ready: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(ready["kind"], "ready");
        ready["address"].as_str().unwrap().to_owned()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn wait(mut self) -> ExitStatus {
        self.end()
    }

    pub fn expect_success(mut self) {
        let status = self.end();
        assert!(status.success(), "{status}; it said {:#?}", self.seen);
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            self.seen.extend(self.lines.try_iter());
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end; it said {:#?}", self.seen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
