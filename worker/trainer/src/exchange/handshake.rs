//! How ranks find each other: each connects to all lower ranks and is found by all higher ones.
//!
//! The one that connects says who it is (magic, job, rank, ranks); the other answers with a code and its own rank.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::link::{Link, read_by, write_by};
use super::{Deadline, ExchangeConfig, ExchangeError};

const MAGIC: [u8; 8] = *b"OBXCHG01";
const JOB_BYTES: usize = 64;
const HELLO_BYTES: usize = 8 + JOB_BYTES + 8;
const ANSWER_BYTES: usize = 8;
const DURING: &str = "connecting";
/// How long to wait between looks at sockets that do not block.
const PAUSE: Duration = Duration::from_millis(5);
/// Connections that have not said who they are yet; more than this are dropped.
const MAX_PENDING: usize = 64;
/// How long a connection may take to say who it is.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

type Hello = [u8; HELLO_BYTES];

/// The answer to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Welcome,
    OtherJob,
    OtherRanks,
    NoSuchRank,
    Taken,
}

/// A connection that has not said who it is.
struct Pending {
    stream: TcpStream,
    hello: Hello,
    filled: usize,
    end: Deadline,
}

/// Connections to all other ranks, by rank.
pub(super) fn connect(
    config: &ExchangeConfig,
    listener: &TcpListener,
    addresses: &[SocketAddr],
) -> Result<Vec<Option<Link>>, ExchangeError> {
    check(config, addresses)?;
    let end = Deadline::after(config.timeout);
    let mut links: Vec<Option<Link>> = (0..config.ranks).map(|_| None).collect();
    for (rank, &address) in (0..config.rank).zip(addresses) {
        links[rank as usize] = Some(Link::new(rank, reach(config, rank, address, end)?));
    }
    accept(config, listener, end, &mut links)?;
    Ok(links)
}

fn check(config: &ExchangeConfig, addresses: &[SocketAddr]) -> Result<(), ExchangeError> {
    let invalid =
        |field, value: String, expected: String| Err(ExchangeError::InvalidConfig { field, value, expected });
    if !(1..=JOB_BYTES).contains(&config.job.len()) || config.job.contains('\0') {
        return invalid(
            "job",
            format!("{:?}", config.job),
            format!("it must be 1 to {JOB_BYTES} bytes without a zero"),
        );
    }
    if config.rank >= config.ranks {
        return invalid("rank", config.rank.to_string(), format!("it must be below ranks, {}", config.ranks));
    }
    if addresses.len() != config.ranks as usize {
        let expected = format!("it must be one for each of the {} ranks", config.ranks);
        return invalid("number of addresses", addresses.len().to_string(), expected);
    }
    if config.timeout.is_zero() {
        return invalid("timeout", "zero".into(), "it must be longer".into());
    }
    Ok(())
}

/// Connects to a lower rank, which may not listen yet.
fn reach(
    config: &ExchangeConfig,
    rank: u32,
    address: SocketAddr,
    end: Deadline,
) -> Result<TcpStream, ExchangeError> {
    let late = || ExchangeError::Late { rank, during: DURING, waited: config.timeout };
    let stream = loop {
        match TcpStream::connect_timeout(&address, end.left().ok_or_else(late)?) {
            Ok(stream) => break stream,
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::TimedOut
                | ErrorKind::Interrupted => {
                    thread::sleep(PAUSE);
                }
                _ => return Err(ExchangeError::Lost { rank, during: DURING, detail: error.to_string() }),
            },
        }
    };
    let lost = |error: std::io::Error| match error.kind() {
        ErrorKind::TimedOut => late(),
        _ => ExchangeError::Lost { rank, during: DURING, detail: error.to_string() },
    };
    stream.set_nodelay(true).map_err(lost)?;
    write_by(&stream, &hello(config, config.rank), end).map_err(lost)?;
    let mut answer = [0; ANSWER_BYTES];
    read_by(&stream, &mut answer, end).map_err(lost)?;
    let found = u32::from_le_bytes([answer[4], answer[5], answer[6], answer[7]]);
    let refused = |reason| ExchangeError::Refused { rank, address, reason };
    match Answer::of(answer[0]) {
        Some(Answer::Welcome) if answer[..4] == Answer::Welcome.encode(rank)[..4] && found == rank => {
            Ok(stream)
        }
        Some(Answer::Welcome) => Err(refused("another rank listens there")),
        Some(answer) => Err(refused(answer.reason())),
        None => Err(refused("it speaks another protocol")),
    }
}

/// Waits for all higher ranks.
fn accept(
    config: &ExchangeConfig,
    listener: &TcpListener,
    end: Deadline,
    links: &mut [Option<Link>],
) -> Result<(), ExchangeError> {
    let first = config.rank as usize + 1;
    if first == links.len() {
        return Ok(());
    }
    let local = |doing| move |source| ExchangeError::Local { doing, source };
    listener.set_nonblocking(true).map_err(local("setting up the listener"))?;
    let mut pending: Vec<Pending> = Vec::new();
    while let Some(missing) = (first..links.len()).find(|&rank| links[rank].is_none()) {
        if end.left().is_none() {
            return Err(ExchangeError::Late { rank: missing as u32, during: DURING, waited: config.timeout });
        }
        match listener.accept() {
            Ok((stream, _)) => {
                if pending.len() < MAX_PENDING && stream.set_nonblocking(true).is_ok() {
                    let end = Deadline::after(HELLO_LIMIT);
                    pending.push(Pending { stream, hello: [0; HELLO_BYTES], filled: 0, end });
                }
            }
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => thread::sleep(PAUSE),
                ErrorKind::Interrupted | ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset => {}
                _ => return Err(local("accepting a connection")(error)),
            },
        }
        for mut candidate in std::mem::take(&mut pending) {
            match candidate.poll() {
                None => pending.push(candidate),
                Some(false) => {}
                Some(true) => welcome(config, candidate, end, links),
            }
        }
    }
    Ok(())
}

impl Pending {
    /// `Some(true)` when the hello is complete, `Some(false)` when it will never be.
    fn poll(&mut self) -> Option<bool> {
        match self.stream.read(&mut self.hello[self.filled..]) {
            Ok(0) => return Some(false),
            Ok(read) => self.filled += read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Some(false),
        }
        match self.filled == HELLO_BYTES {
            true => Some(true),
            false => self.end.left().is_none().then_some(false),
        }
    }
}

/// Answers a complete hello, and keeps the connection when it is from a rank that is missing. A connection that breaks
/// here is a stranger's, or its rank reports the loss.
fn welcome(config: &ExchangeConfig, candidate: Pending, end: Deadline, links: &mut [Option<Link>]) {
    let Pending { stream, hello: said, .. } = candidate;
    let rank = u32::from_le_bytes([said[72], said[73], said[74], said[75]]);
    let expected = hello(config, rank);
    let answer = if said[..72] != expected[..72] {
        Answer::OtherJob
    } else if said[76..] != expected[76..] {
        Answer::OtherRanks
    } else if rank <= config.rank || rank >= config.ranks {
        Answer::NoSuchRank
    } else if links[rank as usize].is_some() {
        Answer::Taken
    } else {
        Answer::Welcome
    };
    let ready = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
    let answered = ready.and_then(|()| write_by(&stream, &answer.encode(config.rank), end));
    if answered.is_ok() && answer == Answer::Welcome {
        links[rank as usize] = Some(Link::new(rank, stream));
    }
}

/// Magic, job padded with zeros, rank, ranks; little-endian.
fn hello(config: &ExchangeConfig, rank: u32) -> Hello {
    let mut hello = [0; HELLO_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..8 + config.job.len()].copy_from_slice(config.job.as_bytes());
    hello[72..76].copy_from_slice(&rank.to_le_bytes());
    hello[76..].copy_from_slice(&config.ranks.to_le_bytes());
    hello
}

impl Answer {
    const ALL: [Answer; 5] =
        [Answer::Welcome, Answer::OtherJob, Answer::OtherRanks, Answer::NoSuchRank, Answer::Taken];

    fn code(self) -> u8 {
        match self {
            Answer::Welcome => 1,
            Answer::OtherJob => 2,
            Answer::OtherRanks => 3,
            Answer::NoSuchRank => 4,
            Answer::Taken => 5,
        }
    }

    fn of(code: u8) -> Option<Answer> {
        Answer::ALL.into_iter().find(|answer| answer.code() == code)
    }

    /// Code, three letters, the answering rank.
    fn encode(self, rank: u32) -> [u8; ANSWER_BYTES] {
        let [a, b, c, d] = rank.to_le_bytes();
        [self.code(), b'O', b'B', b'X', a, b, c, d]
    }

    fn reason(self) -> &'static str {
        match self {
            Answer::Welcome => "none",
            Answer::OtherJob => "it belongs to another job",
            Answer::OtherRanks => "its job has another number of ranks",
            Answer::NoSuchRank => "it does not wait for this rank",
            Answer::Taken => "a connection from this rank is already there",
        }
    }
}
