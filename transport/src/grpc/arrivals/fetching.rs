//! Keys on their way from their homes.

use std::sync::Arc;

use outboard_attention::{Span, TensorSlice};
use outboard_proto::{TaskError, TaskHeader, TensorRef, WireTask};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Arrivals, Content, Failed, Tensor, WholeTask};
use crate::ByteLease;
use crate::parts::Claim;

/// A fetch that is under way.
#[derive(Clone, Debug)]
pub(super) struct Fetching {
    number: u64,
    /// Gives the fetch up once no tensor of it is wanted.
    _wanted: Arc<DropGuard>,
}

/// K and V to fetch for the tasks that name them.
#[derive(Debug)]
pub(in super::super) struct Fetch {
    /// Unlike that of any other of the stream.
    number: u64,
    /// The task that carries them.
    pub(in super::super) header: TaskHeader,
    /// Ids of K and V.
    ids: [u64; 2],
    /// The tokens that they hold.
    pub(in super::super) tokens: Span,
    /// Their memory, in use for as long as it is filled, whoever gives the tasks up meanwhile.
    _lease: ByteLease,
    /// Cancelled once nobody wants them any more.
    pub(in super::super) given_up: CancellationToken,
}

impl Fetching {
    /// The fetch of a number, and what is cancelled once it is given up.
    pub(super) fn new(number: u64) -> (Fetching, CancellationToken) {
        let given_up = CancellationToken::new();
        (Fetching { number, _wanted: Arc::new(given_up.clone().drop_guard()) }, given_up)
    }

    pub(super) fn fetch(
        &self,
        header: &TaskHeader,
        ids: [u64; 2],
        tokens: Span,
        lease: ByteLease,
        given_up: CancellationToken,
    ) -> Fetch {
        Fetch { number: self.number, header: header.clone(), ids, tokens, _lease: lease, given_up }
    }
}

impl Arrivals {
    /// Refuses a task that names a tensor which its homes did not give.
    ///
    /// # Errors
    /// Why they did not.
    pub(in super::super) fn check_given(&self, task: &WireTask) -> Result<(), TaskError> {
        let content = |tensor: &TensorRef| self.tensors.get(&tensor.id).map(|tensor| &tensor.content);
        let lost = task.tensors.iter().find_map(|tensor| match content(tensor) {
            Some(Content::Lost(error)) => Some(error.clone()),
            _ => None,
        });
        lost.map_or(Ok(()), Err)
    }

    /// Takes in K and V that were fetched, and gives back the tasks that have become whole by it. What nobody waits for any
    /// more is dropped.
    ///
    /// # Errors
    /// The tasks that cannot go on without them.
    pub(in super::super) fn fetched(
        &mut self,
        fetch: &Fetch,
        outcome: Result<([TensorSlice; 2], Vec<Claim>), TaskError>,
    ) -> Result<Vec<WholeTask>, Vec<Failed>> {
        let (slices, claims) = outcome.map_err(|error| {
            let mut failed = Vec::new();
            for id in fetch.ids {
                let Some(tensor) = self.awaiting(fetch, id) else { continue };
                // Later tasks may name it, and are told why they cannot have it.
                tensor.content = Content::Lost(error.clone());
                tensor.lease = ByteLease::joined(Vec::new());
                let users = tensor.users.clone();
                failed.extend(self.fail_users(users, &error));
            }
            failed
        })?;
        let mut whole = Vec::new();
        // Whoever holds the tensors' memory lets others find them.
        let claims = ByteLease::holding(0, claims);
        for (id, slice) in fetch.ids.into_iter().zip(slices) {
            let Some(tensor) = self.awaiting(fetch, id) else { continue };
            tensor.lease = ByteLease::joined(vec![tensor.lease.clone(), claims.clone()]);
            tensor.content = Content::Whole(slice);
            let users = tensor.users.clone();
            whole.extend(self.arrived(users));
        }
        Ok(whole)
    }

    /// The tensor that a fetch is to fill. Its id may be another's by now.
    fn awaiting(&mut self, fetch: &Fetch, id: u64) -> Option<&mut Tensor> {
        let is_own = |content: &Content| matches!(content, Content::Fetching(f) if f.number == fetch.number);
        self.tensors.get_mut(&id).filter(|tensor| is_own(&tensor.content))
    }
}
