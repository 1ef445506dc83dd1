//! The credit of one stream, on the server: what it may still spend, and the memory that stands behind it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_proto::TaskError;
use outboard_proto::v1::CreditGrant;
use tokio::sync::{Notify, OwnedSemaphorePermit};

use crate::{ByteBudget, ByteLease};

/// A stream's credit. Freed bytes go back to the stream first, up to its standing credit; the rest to the budget.
///
/// Always: unspent + spent bytes <= standing bytes + what was granted on request, all leased from the budget.
#[derive(Debug)]
pub(super) struct Account {
    budget: ByteBudget,
    standing: u64,
    _standing: Option<OwnedSemaphorePermit>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    granted: Option<OwnedSemaphorePermit>,
    unspent: u64,
    spent: u64,
    /// Part of `unspent` that the client has not been told of.
    owed: u64,
    /// True when that includes what it asked for.
    answers_request: bool,
}

/// Bytes spent, given back on drop.
#[derive(Debug)]
struct Spent {
    account: Arc<Account>,
    bytes: u64,
}

impl Drop for Spent {
    fn drop(&mut self) {
        self.account.free(self.bytes);
    }
}

impl Account {
    /// An account with up to `wish` bytes of standing credit; with none when the budget has no more to set apart.
    pub(super) fn open(budget: &ByteBudget, wish: u64) -> Arc<Account> {
        let (standing, permit) = budget.take_standing(wish);
        let state = Mutex::new(State { unspent: standing, ..State::default() });
        Arc::new(Account {
            budget: budget.clone(),
            standing,
            _standing: permit,
            state,
            changed: Notify::new(),
        })
    }

    /// Credit that the stream starts with.
    pub(super) fn standing(&self) -> u64 {
        self.standing
    }

    /// Spends the sum of `parts`, with a lease for each.
    ///
    /// # Errors
    /// [`outboard_proto::ErrorKind::Invalid`] when the stream does not hold so much.
    pub(super) fn spend(self: &Arc<Self>, parts: &[u64]) -> Result<Vec<ByteLease>, TaskError> {
        let total = parts.iter().fold(0, |sum: u64, &part| sum.saturating_add(part));
        let mut state = self.state();
        // The client can only know of what it was told.
        let known = state.unspent - state.owed;
        if total > known {
            return Err(TaskError::invalid(format!(
                "the task needs {total} bytes (its header, tensors it carries, and results), and the stream holds credit for {known}; ask \
                 for credit before sending a task"
            )));
        }
        state.unspent -= total;
        state.spent += total;
        drop(state);
        let lease = |&bytes| ByteLease::holding(bytes, Spent { account: Arc::clone(self), bytes });
        Ok(parts.iter().map(lease).collect())
    }

    /// Waits for `bytes` of memory and grants them.
    ///
    /// # Errors
    /// As [`ByteBudget::lease`].
    pub(super) async fn grant(self: Arc<Self>, bytes: u64) -> Result<(), TaskError> {
        let permit = self.budget.take(bytes).await?;
        let mut state = self.state();
        match &mut state.granted {
            Some(granted) => granted.merge(permit),
            empty => *empty = Some(permit),
        }
        state.unspent += bytes;
        state.owed += bytes;
        state.answers_request = true;
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes back credit that the client will not spend.
    pub(super) fn give_back(&self, bytes: u64) {
        let mut state = self.state();
        state.unspent -= bytes.min(state.unspent - state.owed);
        self.release(&mut state);
    }

    /// Resolves when credit may be owed to the client.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Credit granted that the client has not been told of; it is told now.
    pub(super) fn take_owed(&self) -> Option<CreditGrant> {
        let mut state = self.state();
        let bytes = std::mem::take(&mut state.owed);
        let answers_request = std::mem::take(&mut state.answers_request);
        (bytes > 0).then_some(CreditGrant { bytes, answers_request })
    }

    fn free(&self, bytes: u64) {
        let mut state = self.state();
        state.spent -= bytes.min(state.spent);
        let again = bytes.min(self.standing.saturating_sub(state.unspent));
        state.unspent += again;
        state.owed += again;
        self.release(&mut state);
        drop(state);
        if again > 0 {
            self.changed.notify_one();
        }
    }

    /// Gives granted memory back to the budget that nothing needs any more.
    fn release(&self, state: &mut State) {
        let needed = ByteBudget::units((state.unspent + state.spent).saturating_sub(self.standing));
        let Some(granted) = &mut state.granted else { return };
        let excess = granted.num_permits().saturating_sub(needed);
        drop(granted.split(excess));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    #[tokio::test]
    async fn freed_bytes_refill_the_standing_credit_and_then_the_budget() {
        let budget = ByteBudget::new(64 * KIB);
        let account = Account::open(&budget, 8 * KIB);
        assert_eq!((account.standing(), budget.used()), (8 * KIB, 8 * KIB));
        account.spend(&[6 * KIB, 3 * KIB]).expect_err("more than the stream holds");
        Arc::clone(&account).grant(12 * KIB).await.unwrap();
        account.spend(&[20 * KIB]).expect_err("not told of the grant yet");
        assert_eq!(account.take_owed(), Some(CreditGrant { bytes: 12 * KIB, answers_request: true }));
        let leases = account.spend(&[15 * KIB, 5 * KIB]).unwrap();
        assert_eq!(budget.used(), 20 * KIB);
        let [large, small] = <[ByteLease; 2]>::try_from(leases).unwrap();
        drop(small);
        let again = |bytes| Some(CreditGrant { bytes, answers_request: false });
        assert_eq!((account.take_owed(), budget.used()), (again(5 * KIB), 20 * KIB));
        drop(large.clone());
        assert_eq!(budget.used(), 20 * KIB);
        drop(large);
        assert_eq!((account.take_owed(), budget.used()), (again(3 * KIB), 8 * KIB));
        drop(account);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn unspent_credit_goes_back() {
        let budget = ByteBudget::new(64 * KIB);
        let account = Account::open(&budget, KIB);
        Arc::clone(&account).grant(40 * KIB).await.unwrap();
        account.take_owed();
        account.give_back(u64::MAX);
        assert_eq!(budget.used(), KIB);
        account.spend(&[1]).expect_err("all was given back");
    }

    #[test]
    fn idle_credit_never_takes_more_than_its_quarter() {
        let budget = ByteBudget::new(64 * KIB);
        let accounts: Vec<_> = (0..10).map(|_| Account::open(&budget, 8 * KIB)).collect();
        assert_eq!(accounts.iter().map(|a| a.standing()).sum::<u64>(), 16 * KIB);
        assert!(budget.try_lease(budget.largest()).is_some());
    }
}
