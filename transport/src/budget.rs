//! Memory of a server, counted in bytes before it is used.

use std::fmt::Debug;
use std::sync::Arc;

use outboard_proto::{ErrorKind, TaskError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes are counted in units of this size, so that the semaphore's 32-bit requests reach terabytes.
const UNIT: u64 = 1024;

/// How many bytes of buffers may be in use at once. Requests are granted first come, first served.
///
/// A quarter is set apart for credit that connected clients hold idle. Whoever waits for the rest therefore waits for
/// tasks to end, never for a client to speak.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    requests: Arc<Semaphore>,
    standing: Arc<Semaphore>,
    limit: u64,
    standing_limit: u64,
}

/// Bytes in use, given back when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct ByteLease {
    bytes: u64,
    _held: Arc<dyn Debug + Send + Sync>,
}

impl ByteBudget {
    /// A budget of `limit` bytes, rounded down to whole KiB.
    pub fn new(limit: u64) -> ByteBudget {
        let units = (limit / UNIT).min(u64::from(u32::MAX)).min(Semaphore::MAX_PERMITS as u64);
        let standing = units / 4;
        ByteBudget {
            requests: Arc::new(Semaphore::new((units - standing) as usize)),
            standing: Arc::new(Semaphore::new(standing as usize)),
            limit: units * UNIT,
            standing_limit: standing * UNIT,
        }
    }

    /// Most bytes ever in use at once.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Most bytes that one request can get.
    pub fn largest(&self) -> u64 {
        self.limit - self.standing_limit
    }

    /// Bytes in use now, credit held by connected clients included.
    pub fn used(&self) -> u64 {
        let free = (self.requests.available_permits() + self.standing.available_permits()) as u64;
        self.limit - (free * UNIT).min(self.limit)
    }

    /// Takes `bytes`, waiting behind earlier requests.
    ///
    /// # Errors
    /// [`ErrorKind::TooLarge`] when they could never fit, [`ErrorKind::Unavailable`] when the budget was closed.
    pub async fn lease(&self, bytes: u64) -> Result<ByteLease, TaskError> {
        let permit = self.take(bytes).await?;
        Ok(ByteLease::holding(bytes, permit))
    }

    /// Takes room for two things at once, with a lease for each.
    ///
    /// # Errors
    /// As [`ByteBudget::lease`].
    pub(crate) async fn lease_both(&self, first: u64, second: u64) -> Result<[ByteLease; 2], TaskError> {
        let permit = self.take(Self::sum(first, second)).await?;
        Ok(Self::halves(permit, first, second))
    }

    /// The same if there is room now; `None` when there is not.
    pub(crate) fn try_lease_both(&self, first: u64, second: u64) -> Option<[ByteLease; 2]> {
        let units = self.units_of(Self::sum(first, second)).ok()?;
        let permit = Arc::clone(&self.requests).try_acquire_many_owned(units).ok()?;
        Some(Self::halves(permit, first, second))
    }

    /// Bytes whose units are those of two things.
    fn sum(first: u64, second: u64) -> u64 {
        first.div_ceil(UNIT).saturating_mul(UNIT).saturating_add(second)
    }

    fn halves(mut permit: OwnedSemaphorePermit, first: u64, second: u64) -> [ByteLease; 2] {
        let other = permit.split(Self::units(second));
        [ByteLease::holding(first, permit), ByteLease::holding(second, other)]
    }

    /// Takes `bytes` if they are free now; `None` when they are not.
    pub fn try_lease(&self, bytes: u64) -> Option<ByteLease> {
        let units = self.units_of(bytes).ok()?;
        let permit = Arc::clone(&self.requests).try_acquire_many_owned(units).ok()?;
        Some(ByteLease::holding(bytes, permit))
    }

    /// Refuses all requests from now on, waiting ones included.
    pub fn close(&self) {
        self.requests.close();
    }

    /// As [`ByteBudget::lease`], as a permit of [`ByteBudget::units`] that can be given back piecemeal.
    pub(crate) async fn take(&self, bytes: u64) -> Result<OwnedSemaphorePermit, TaskError> {
        let units = self.units_of(bytes)?;
        let closed = |_| TaskError::unavailable("the server is shutting down; send the task to another");
        Arc::clone(&self.requests).acquire_many_owned(units).await.map_err(closed)
    }

    /// Takes up to `bytes` of the part set apart for idle credit: all of them, or none. Gives back how many.
    pub(crate) fn take_standing(&self, bytes: u64) -> (u64, Option<OwnedSemaphorePermit>) {
        let units = (bytes / UNIT).min(self.standing_limit / UNIT);
        match Arc::clone(&self.standing).try_acquire_many_owned(units as u32) {
            Ok(permit) => (units * UNIT, Some(permit)),
            Err(_) => (0, None),
        }
    }

    /// How many units hold `bytes`.
    pub(crate) fn units(bytes: u64) -> usize {
        bytes.div_ceil(UNIT) as usize
    }

    fn units_of(&self, bytes: u64) -> Result<u32, TaskError> {
        let (units, largest) = (bytes.div_ceil(UNIT), self.largest());
        match u32::try_from(units) {
            Ok(small) if units <= largest / UNIT => Ok(small),
            _ => Err(too_large(bytes, largest)),
        }
    }
}

/// The error of a request that the server could never hold.
pub(crate) fn too_large(bytes: u64, largest: u64) -> TaskError {
    let message = format!(
        "{bytes} bytes are needed at once, and the server can hold {largest}; cut the work into smaller pieces, or start the \
         server with more memory"
    );
    TaskError::new(ErrorKind::TooLarge, message)
}

impl ByteLease {
    /// A lease that lasts as long as `held`.
    pub(crate) fn holding(bytes: u64, held: impl Debug + Send + Sync + 'static) -> ByteLease {
        ByteLease { bytes, _held: Arc::new(held) }
    }

    /// Several leases as one.
    pub(crate) fn joined(leases: Vec<ByteLease>) -> ByteLease {
        let bytes = leases.iter().map(|lease| lease.bytes).sum();
        ByteLease::holding(bytes, leases)
    }

    /// Bytes held. Those of a tensor that several tasks read count in the lease of each.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
