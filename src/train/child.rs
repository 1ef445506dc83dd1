//! Child processes that speak JSON lines, and that never outlive their parent: they end when their standard input does,
//! and are killed when their handle is dropped.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use outboard_trainer::LAUNCH_ENVIRONMENT;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// How long a child that was told to end may take before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A running child.
pub(crate) struct JsonChild {
    /// For people: what it is.
    pub(crate) name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines<BufReader<ChildStdout>>,
}

impl JsonChild {
    /// Starts this program again with other arguments. Its standard error is the parent's.
    pub(crate) fn start(name: String, args: &[OsString]) -> anyhow::Result<JsonChild> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut child = Command::new(program)
            .args(args)
            .envs(LAUNCH_ENVIRONMENT)
            // A group of its own, so that Ctrl-C on the terminal reaches the parent alone, which ends its children.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().with_context(|| format!("{name} has no standard output"))?;
        Ok(JsonChild { name, child, stdin, stdout: BufReader::new(stdout).lines() })
    }

    /// Its process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Writes one line to it.
    pub(crate) async fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let stdin = self.stdin.as_mut().with_context(|| format!("{} was told to end", self.name))?;
        let written = async {
            stdin.write_all(&line).await?;
            stdin.flush().await
        };
        written.await.with_context(|| format!("{} does not listen any more", self.name))
    }

    /// Reads the next line from it; `None` when it has ended.
    pub(crate) async fn receive<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        let name = &self.name;
        let line = self.stdout.next_line().await.with_context(|| format!("cannot read from {name}"))?;
        let parse = |line: String| {
            serde_json::from_str(&line).with_context(|| format!("{name} said what is not understood: {line}"))
        };
        line.map(parse).transpose()
    }

    /// Reads the next line, which must come within `limit`.
    pub(crate) async fn expect<T: DeserializeOwned>(&mut self, limit: Duration) -> anyhow::Result<T> {
        let received = timeout(limit, self.receive()).await;
        match received {
            Err(_) => bail!("{} said nothing for {:.0} s", self.name, limit.as_secs_f64()),
            Ok(Err(error)) => Err(error),
            Ok(Ok(Some(message))) => Ok(message),
            Ok(Ok(None)) => {
                let how = self.how_it_ended().await;
                bail!("{} ended: {how}", self.name)
            }
        }
    }

    /// Closes its standard input, upon which it ends, and waits; kills it when it takes too long.
    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        match timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => bail!("{} ended with {status}", self.name),
            Ok(Err(error)) => Err(error).with_context(|| format!("cannot wait for {}", self.name)),
            Err(_) => {
                self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))?;
                bail!("{} did not end within {:.0} s and was killed", self.name, END_TIMEOUT.as_secs_f64())
            }
        }
    }

    async fn how_it_ended(&mut self) -> String {
        match timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            _ => "its output closed while it still runs".to_owned(),
        }
    }
}
