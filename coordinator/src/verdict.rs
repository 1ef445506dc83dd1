//! One answer that many calls wait for.

use std::sync::Arc;

use tokio::sync::watch;

use crate::Error;

type Answer<T> = Option<Result<Arc<T>, Error>>;

/// An answer that is given once, to all who wait.
#[derive(Debug)]
pub(crate) struct Verdict<T>(watch::Sender<Answer<T>>);

/// Waits for a verdict.
#[derive(Debug)]
pub(crate) struct Awaited<T>(watch::Receiver<Answer<T>>);

impl<T> Verdict<T> {
    pub(crate) fn new() -> Self {
        Verdict(watch::Sender::new(None))
    }

    /// Gives the answer; only the first one counts.
    pub(crate) fn give(&self, answer: Result<Arc<T>, Error>) {
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(answer);
            }
            first
        });
    }

    pub(crate) fn awaited(&self) -> Awaited<T> {
        Awaited(self.0.subscribe())
    }

    /// How many calls wait, or hold on to the answer.
    pub(crate) fn waiting(&self) -> usize {
        self.0.receiver_count()
    }
}

impl<T> Awaited<T> {
    /// The answer, when it is given. Whoever owns the verdict bounds the wait.
    pub(crate) async fn answer(mut self) -> Result<Arc<T>, Error> {
        let dropped = || Error::unavailable("the coordinator forgot the call; make it again");
        let answer = self.0.wait_for(Option::is_some).await.map_err(|_| dropped())?;
        answer.clone().unwrap_or_else(|| Err(dropped()))
    }
}
