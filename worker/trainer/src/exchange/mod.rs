//! A small exchange of numbers between the ranks of a job.
//!
//! It stands in for the trainer's collective library (NCCL, Gloo), which is not what this project is about: a full mesh
//! of TCP connections, every rank sending all it has to every other. It keeps what training semantics need: ranks add
//! contributions in rank order, so that all of them hold the same bits; and a rank that is lost, late, or doing
//! something else is named, within a bounded time.

mod handshake;
mod link;

use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use link::{Header, Link, Operation};

/// What a rank tells about itself to join an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeConfig {
    /// Names the job, 1 to 64 bytes. A connection that names another is refused.
    pub job: String,
    /// This rank.
    pub rank: u32,
    /// Ranks of the job.
    pub ranks: u32,
    /// The longest that connecting, or any one operation, may take. It bounds how far ranks may drift apart, so it must
    /// exceed the difference between the slowest and the fastest rank's step.
    pub timeout: Duration,
}

/// Why the exchange failed. After any of these it cannot be used again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// A setting out of its range.
    #[error("exchange: {field} is {value}; {expected}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        expected: String,
    },
    /// This rank's own socket or thread failed.
    #[error("exchange: {doing} failed: {source}")]
    Local {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A rank's connection broke: its process ended or its machine is gone.
    #[error("exchange: rank {rank} was lost during {during}: {detail}; look at that rank's own error")]
    Lost {
        /// The rank.
        rank: u32,
        /// What was being done.
        during: &'static str,
        /// What the system said.
        detail: String,
    },
    /// A rank did not answer in time.
    #[error("exchange: rank {rank} did not take part in {during} within {} s; it hangs, or the timeout is too short", waited.as_secs_f32())]
    Late {
        /// The rank.
        rank: u32,
        /// What was being done.
        during: &'static str,
        /// How long this rank waited.
        waited: Duration,
    },
    /// Whoever listens at a rank's address refused this rank.
    #[error("exchange: the process at {address}, expected to be rank {rank}, refused: {reason}")]
    Refused {
        /// The rank that was expected there.
        rank: u32,
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: &'static str,
    },
    /// A rank is at another operation than this one.
    #[error(
        "exchange: rank {rank} is out of step: expected {expected}, received {received}; all ranks must run the same steps with the same settings"
    )]
    OutOfStep {
        /// The rank.
        rank: u32,
        /// The operation of this rank.
        expected: String,
        /// The operation of that rank.
        received: String,
    },
    /// An operation after one that failed.
    #[error("exchange: an earlier operation failed, so this one cannot run")]
    Failed,
}

/// One rank's end of the exchange. All ranks must call the same operations in the same order; calls block.
#[derive(Debug)]
pub struct Exchange {
    rank: usize,
    timeout: Duration,
    /// Connections by rank; none to itself.
    links: Vec<Option<Link>>,
    sequence: u64,
    failed: bool,
}

impl Exchange {
    /// The exchange of a job with one rank: every operation returns at once.
    pub fn alone() -> Self {
        Exchange { rank: 0, timeout: Duration::ZERO, links: vec![None], sequence: 0, failed: false }
    }

    /// Connects all ranks: this one to the lower ranks' `addresses` (by rank; its own and the higher ones may be
    /// anything), the higher ones to its `listener`. Lower ranks need not listen yet. Strangers who connect to
    /// `listener` are refused and do no harm.
    ///
    /// # Errors
    /// [`ExchangeError`] naming the rank that could not be reached or did not come within the timeout.
    pub fn connect(
        config: &ExchangeConfig,
        listener: &TcpListener,
        addresses: &[SocketAddr],
    ) -> Result<Self, ExchangeError> {
        let links = handshake::connect(config, listener, addresses)?;
        Ok(Exchange {
            rank: config.rank as usize,
            timeout: config.timeout,
            links,
            sequence: 0,
            failed: false,
        })
    }

    /// Ranks of the job.
    pub fn ranks(&self) -> usize {
        self.links.len()
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Every rank's `values`, by rank. All ranks must give equally many.
    ///
    /// # Errors
    /// [`ExchangeError`] naming the rank at fault.
    pub fn all_gather_u64(&mut self, values: &[u64]) -> Result<Vec<Vec<u64>>, ExchangeError> {
        let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut gathered = Vec::with_capacity(self.ranks());
        self.exchange(Operation::GatherU64, &payload, |contribution| {
            gathered.push(contribution.as_chunks::<8>().0.iter().map(|&b| u64::from_le_bytes(b)).collect());
        })?;
        Ok(gathered)
    }

    /// Every rank's `values`, by rank, with their exact bits. All ranks must give equally many.
    ///
    /// # Errors
    /// [`ExchangeError`] naming the rank at fault.
    pub fn all_gather_f64(&mut self, values: &[f64]) -> Result<Vec<Vec<f64>>, ExchangeError> {
        let bits: Vec<u64> = values.iter().map(|value| value.to_bits()).collect();
        let gathered = self.all_gather_u64(&bits)?;
        Ok(gathered.into_iter().map(|of_rank| of_rank.into_iter().map(f64::from_bits).collect()).collect())
    }

    /// Replaces `values` by the sum over all ranks, element by element, in f32 and in rank order: `(v0 + v1) + v2 ...`.
    /// All ranks end with the same bits.
    ///
    /// # Errors
    /// [`ExchangeError`] naming the rank at fault; `values` then holds nothing of use.
    pub fn sum_in_rank_order(&mut self, values: &mut [f32]) -> Result<(), ExchangeError> {
        if self.ranks() == 1 {
            return Ok(());
        }
        let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut first = true;
        self.exchange(Operation::SumF32, &payload, |contribution| {
            let contribution = contribution.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
            if first {
                values.iter_mut().zip(contribution).for_each(|(sum, value)| *sum = value);
            } else {
                values.iter_mut().zip(contribution).for_each(|(sum, value)| *sum += value);
            }
            first = false;
        })
    }

    /// Sends `payload` to all others and hands every rank's contribution, its own included, to `take` in rank order.
    fn exchange(
        &mut self,
        operation: Operation,
        payload: &[u8],
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), ExchangeError> {
        if self.failed {
            return Err(ExchangeError::Failed);
        }
        let header = Header { operation, sequence: self.sequence, bytes: payload.len() as u64 };
        self.sequence += 1;
        // Set back only when all went well: what is left in a socket after a failure belongs to no operation.
        self.failed = true;
        let end = Deadline::after(self.timeout);
        // Each connection has a writer of its own, so this rank reads while it writes: two ranks with more to say than
        // sockets buffer never wait for each other.
        thread::scope(|scope| {
            let mut writers = Vec::new();
            for link in self.links.iter().flatten() {
                let writer = thread::Builder::new()
                    .name(format!("to rank {}", link.rank()))
                    .spawn_scoped(scope, move || link.send(&header, payload, end))
                    .map_err(|source| ExchangeError::Local { doing: "starting a writer thread", source })?;
                writers.push(writer);
            }
            let mut buffer = vec![0; if self.ranks() > 1 { payload.len() } else { 0 }];
            for link in &self.links {
                match link {
                    Some(link) => {
                        link.receive(&header, &mut buffer, end)?;
                        take(&buffer);
                    }
                    None => take(payload),
                }
            }
            for writer in writers {
                let panicked = || std::io::Error::other("the writer thread panicked");
                writer
                    .join()
                    .map_err(|_| ExchangeError::Local { doing: "sending", source: panicked() })??;
            }
            Ok::<(), ExchangeError>(())
        })?;
        self.failed = false;
        Ok(())
    }
}

/// When an operation began and must have ended.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    began: Instant,
    limit: Duration,
}

impl Deadline {
    fn after(limit: Duration) -> Self {
        Deadline { began: Instant::now(), limit }
    }

    /// What is left, or `None` when nothing is.
    fn left(self) -> Option<Duration> {
        self.limit.checked_sub(self.began.elapsed()).filter(|left| !left.is_zero())
    }
}
