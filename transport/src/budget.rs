//! Memory of a server, counted in bytes before it is used.

use std::sync::Arc;

use outboard_proto::{ErrorKind, TaskError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes are counted in units of this size, so that the semaphore's 32-bit requests reach terabytes.
const UNIT: u64 = 1024;

/// How many bytes of buffers may be in use at once. Requests are granted first come, first served.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    units: Arc<Semaphore>,
    limit: u64,
}

/// Bytes in use, given back on drop.
#[derive(Debug)]
pub struct ByteLease {
    _permit: OwnedSemaphorePermit,
    bytes: u64,
}

impl ByteBudget {
    /// A budget of `limit` bytes, rounded down to whole KiB.
    pub fn new(limit: u64) -> ByteBudget {
        let units = (limit / UNIT).min(u64::from(u32::MAX)).min(Semaphore::MAX_PERMITS as u64);
        ByteBudget { units: Arc::new(Semaphore::new(units as usize)), limit: units * UNIT }
    }

    /// Most bytes ever in use at once.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in use now.
    pub fn used(&self) -> u64 {
        self.limit - (self.units.available_permits() as u64 * UNIT).min(self.limit)
    }

    /// Takes `bytes`, waiting behind earlier requests.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] when they could never fit, [`ErrorKind::Unavailable`] when the budget was closed.
    pub async fn lease(&self, bytes: u64) -> Result<ByteLease, TaskError> {
        let units = self.units_of(bytes)?;
        match Arc::clone(&self.units).acquire_many_owned(units).await {
            Ok(permit) => Ok(ByteLease { _permit: permit, bytes }),
            Err(_) => Err(TaskError::unavailable("the server is shutting down; send the task to another")),
        }
    }

    /// Takes `bytes` if they are free now; `None` when they are not.
    pub fn try_lease(&self, bytes: u64) -> Option<ByteLease> {
        let units = self.units_of(bytes).ok()?;
        let permit = Arc::clone(&self.units).try_acquire_many_owned(units).ok()?;
        Some(ByteLease { _permit: permit, bytes })
    }

    /// Refuses all requests from now on, waiting ones included.
    pub fn close(&self) {
        self.units.close();
    }

    fn units_of(&self, bytes: u64) -> Result<u32, TaskError> {
        let units = bytes.div_ceil(UNIT);
        if units * UNIT > self.limit {
            let limit = self.limit;
            let message = format!(
                "{bytes} bytes are asked for at once, and the server's memory is {limit} bytes; ship smaller pieces or \
                 start the server with more memory"
            );
            return Err(TaskError::new(ErrorKind::TooLarge, message));
        }
        Ok(units as u32)
    }
}

impl ByteLease {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
