//! One connection to another rank: framed messages with a deadline.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;

use super::{Deadline, ExchangeError};

const MAGIC: u32 = u32::from_le_bytes(*b"OBXM");
const HEADER_BYTES: usize = 24;

/// What a message is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// A gather of 64-bit numbers.
    GatherU64,
    /// A sum of f32.
    SumF32,
}

/// Leads every message: magic, operation, sequence, bytes of payload; little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) operation: Operation,
    pub(super) sequence: u64,
    pub(super) bytes: u64,
}

/// A connection to another rank.
#[derive(Debug)]
pub(super) struct Link {
    rank: u32,
    stream: TcpStream,
}

impl Operation {
    fn code(self) -> u32 {
        match self {
            Operation::GatherU64 => 1,
            Operation::SumF32 => 2,
        }
    }

    fn of(code: u32) -> Option<Self> {
        [Operation::GatherU64, Operation::SumF32].into_iter().find(|operation| operation.code() == code)
    }

    fn name(self) -> &'static str {
        match self {
            Operation::GatherU64 => "a gather of counts",
            Operation::SumF32 => "the sum of gradients",
        }
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes as operation {}", self.operation.name(), self.bytes, self.sequence)
    }
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.operation.code().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
        let (words, _) = bytes.as_chunks::<4>();
        let (longs, _) = bytes.as_chunks::<8>();
        let operation = Operation::of(u32::from_le_bytes(words[1]))?;
        let header =
            Header { operation, sequence: u64::from_le_bytes(longs[1]), bytes: u64::from_le_bytes(longs[2]) };
        (u32::from_le_bytes(words[0]) == MAGIC).then_some(header)
    }
}

impl Link {
    pub(super) fn new(rank: u32, stream: TcpStream) -> Self {
        Link { rank, stream }
    }

    pub(super) fn rank(&self) -> u32 {
        self.rank
    }

    pub(super) fn send(&self, header: &Header, payload: &[u8], end: Deadline) -> Result<(), ExchangeError> {
        let during = header.operation.name();
        write_by(&self.stream, &header.encode(), end).map_err(|e| self.fault(e, during, end))?;
        write_by(&self.stream, payload, end).map_err(|e| self.fault(e, during, end))
    }

    /// Fills `payload` from a message that must be of the same operation as `expected`.
    pub(super) fn receive(
        &self,
        expected: &Header,
        payload: &mut [u8],
        end: Deadline,
    ) -> Result<(), ExchangeError> {
        let during = expected.operation.name();
        let mut bytes = [0; HEADER_BYTES];
        read_by(&self.stream, &mut bytes, end).map_err(|e| self.fault(e, during, end))?;
        match Header::decode(&bytes) {
            Some(header) if header == *expected => {}
            other => {
                let received =
                    other.map_or("bytes that are no message".to_string(), |header| header.to_string());
                return Err(ExchangeError::OutOfStep {
                    rank: self.rank,
                    expected: expected.to_string(),
                    received,
                });
            }
        }
        read_by(&self.stream, payload, end).map_err(|e| self.fault(e, during, end))
    }

    fn fault(&self, error: io::Error, during: &'static str, end: Deadline) -> ExchangeError {
        match error.kind() {
            ErrorKind::TimedOut => ExchangeError::Late { rank: self.rank, during, waited: end.limit },
            _ => ExchangeError::Lost { rank: self.rank, during, detail: error.to_string() },
        }
    }
}

/// Writes everything before the deadline, or fails with [`ErrorKind::TimedOut`].
pub(super) fn write_by(mut stream: &TcpStream, mut bytes: &[u8], end: Deadline) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(end.left().ok_or(ErrorKind::TimedOut)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => not_now(error)?,
        }
    }
    Ok(())
}

/// Fills `bytes` before the deadline, or fails with [`ErrorKind::TimedOut`].
pub(super) fn read_by(mut stream: &TcpStream, mut bytes: &mut [u8], end: Deadline) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_read_timeout(Some(end.left().ok_or(ErrorKind::TimedOut)?))?;
        match stream.read(bytes) {
            Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "it closed the connection")),
            Ok(read) => bytes = &mut bytes[read..],
            Err(error) => not_now(error)?,
        }
    }
    Ok(())
}

/// Passes over the errors that only mean "try again"; the deadline is looked at by the caller's loop.
fn not_now(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}
