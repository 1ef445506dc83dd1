//! When a process should end: by a signal, or because the process that started it is gone.

use tokio::signal::unix::{SignalKind, signal};

/// Resolves at SIGTERM or Ctrl-C, with the signal's name.
pub(crate) async fn signalled() -> anyhow::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("Ctrl-C"),
    }
}

/// Resolves when standard input ends, which it does when the parent process dies, however it dies.
pub(crate) async fn parent_gone() {
    let mut sink = tokio::io::sink();
    // An error means that the pipe is broken, which is an end just the same.
    let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut sink).await;
}
