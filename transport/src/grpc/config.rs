//! How both gRPC ends are set up. Frames, windows and keep-alive are alike on both sides, since each side's setting
//! governs what the other may send.

use std::time::Duration;

use outboard_proto::MAX_CHUNK_BYTES;

/// Largest HTTP/2 frame: a whole chunk with its message header. The default of 16 KiB costs more than half the speed.
pub(crate) const FRAME_BYTES: u32 = MAX_CHUNK_BYTES as u32 + 4096;

/// The link itself, alike on both sides.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// HTTP/2 flow-control window of a stream and of a connection, in bytes. Best at 1 to 4 MiB on a fast short link; a
    /// long link needs its bandwidth x delay.
    pub window_bytes: u32,
    /// How often a silent peer is pinged.
    pub keep_alive_interval: Duration,
    /// How long the answer to a ping may take before the connection counts as dead.
    pub keep_alive_timeout: Duration,
    /// How long a home, or a server that delivers to one, may take for an answer or for the next MiB of a tensor.
    pub stall_timeout: Duration,
}

impl Default for LinkConfig {
    fn default() -> Self {
        LinkConfig {
            window_bytes: 4 << 20,
            keep_alive_interval: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// A client of one attention server.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Where the server listens, "host:port".
    pub address: String,
    /// The job, for messages to people.
    pub job: String,
    /// The rank, for messages to people.
    pub rank: u32,
    /// A numerics id that the server must have for some element type, or none.
    pub numerics_id: Option<String>,
    /// Most streams opened to the server, each with a connection of its own; 1 or more.
    pub streams: usize,
    /// How long connecting may take, greeting included.
    pub connect_timeout: Duration,
    /// How long a shipment may wait for room at the server.
    pub credit_timeout: Duration,
    /// Most tasks that may be under way at once; more are refused as busy.
    pub max_tasks: usize,
    /// The link.
    pub link: LinkConfig,
}

impl ClientConfig {
    /// A client of the server at `address` ("host:port"), with one stream.
    pub fn new(address: impl Into<String>) -> ClientConfig {
        ClientConfig {
            address: address.into(),
            job: String::new(),
            rank: 0,
            numerics_id: None,
            streams: 1,
            connect_timeout: Duration::from_secs(5),
            credit_timeout: Duration::from_secs(300),
            max_tasks: 16384,
            link: LinkConfig::default(),
        }
    }
}

/// The gRPC end of an attention server.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Credit that a client may hold idle on all its streams together, in bytes; less where memory is short.
    pub window_bytes: u64,
    /// Most tasks that one stream may have under way; more are refused as busy.
    pub max_tasks: usize,
    /// How long a stream with half-sent tasks, or with results that nobody reads, may stand still.
    pub stall_timeout: Duration,
    /// How long a client may take to end a drained stream that has no tasks left.
    pub linger: Duration,
    /// The link.
    pub link: LinkConfig,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            window_bytes: 64 << 20,
            max_tasks: 16384,
            stall_timeout: Duration::from_secs(60),
            linger: Duration::from_secs(10),
            link: LinkConfig::default(),
        }
    }
}
