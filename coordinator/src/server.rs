//! A server as the pool knows it.

use std::collections::BTreeMap;
use std::fmt;

use outboard_attention::{DType, HeadGeometry, MAX_HEAD_DIM};

use crate::Error;
use crate::text::{check_address, check_name, check_text, listed};

/// Names a registration of a server. Ids grow; a server that registers anew gets another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerId(pub u64);

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The rank that an in-place server shares a device with.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InPlace {
    /// The rank's job.
    pub job: String,
    /// The rank.
    pub rank: u32,
}

/// What a server says of itself when it registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec {
    /// Host name, for people.
    pub host: String,
    /// Where its attention service listens, `host:port`.
    pub address: String,
    /// Path of a local socket where it listens too; empty when it has none.
    pub socket: String,
    /// What computes, such as `cpu` or `cuda:0`.
    pub device: String,
    /// Bytes of buffers it may hold.
    pub memory_bytes: u64,
    /// Element types it computes, each with its numerics id: equal ids give equal bits.
    pub numerics: BTreeMap<DType, String>,
    /// Largest head dimension it computes.
    pub max_head_dim: u32,
    /// The rank it shares a device with, `None` for a dedicated server.
    pub in_place: Option<InPlace>,
}

impl ServerSpec {
    /// Checks that the server can be put to use.
    ///
    /// # Errors
    /// An error of kind `Invalid` that names the field and its value.
    pub fn check(&self) -> Result<(), Error> {
        check_address("server.address", &self.address)?;
        if self.numerics.is_empty() {
            return Err(Error::invalid("server.dtypes is empty; name the element types the server computes"));
        }
        for (dtype, id) in &self.numerics {
            check_name(&format!("server.numerics_ids of {dtype}"), id)?;
        }
        for (field, text) in
            [("server.host", &self.host), ("server.device", &self.device), ("server.socket", &self.socket)]
        {
            check_text(field, text)?;
        }
        if self.memory_bytes == 0 {
            return Err(Error::invalid("server.memory_bytes is 0; a server needs room for a task's tensors"));
        }
        if !(1..=MAX_HEAD_DIM as u32).contains(&self.max_head_dim) {
            let value = self.max_head_dim;
            let message = format!("server.max_head_dim is {value}; it must be between 1 and {MAX_HEAD_DIM}");
            return Err(Error::invalid(message));
        }
        match &self.in_place {
            Some(place) => check_name("server.job", &place.job),
            None => Ok(()),
        }
    }

    /// True when it is dedicated, or in place at a rank of the job.
    pub(crate) fn serves(&self, job: &str) -> bool {
        self.in_place.as_ref().is_none_or(|place| place.job == job)
    }

    /// Why the server cannot compute heads of this geometry, or `None` when it can.
    pub(crate) fn unsuited_for(&self, geometry: &HeadGeometry) -> Option<String> {
        let dim = geometry.head_dim().max(geometry.v_head_dim());
        if dim > self.max_head_dim as usize {
            return Some(format!("computes head dims up to {}, the job has {dim}", self.max_head_dim));
        }
        let dtype = geometry.dtype();
        self.numerics_id(dtype)
            .is_none()
            .then(|| format!("does not compute {dtype}, only {}", listed(self.numerics.keys())))
    }

    /// The numerics id of an element type, `None` when the server does not compute it.
    pub(crate) fn numerics_id(&self, dtype: DType) -> Option<&str> {
        self.numerics.get(&dtype).map(String::as_str)
    }
}
