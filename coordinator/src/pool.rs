//! The pool: which servers there are, and for how long. A pure state machine; time comes in as an argument.
//!
//! A server stays for one lease from its registration or last heartbeat. A server that a rank gave up is *suspect*: it
//! gets no plans until it sends a heartbeat one lease or more after the last such report, so that a server which is
//! alive but cannot be reached does not come back at every step.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outboard_proto::ErrorKind;

use crate::Error;
use crate::server::{InPlace, ServerId, ServerSpec};
use crate::text::servers;

/// The servers.
#[derive(Debug)]
pub(crate) struct Pool {
    lease: Duration,
    max_servers: usize,
    next_id: u64,
    servers: BTreeMap<ServerId, Entry>,
    by_address: HashMap<String, ServerId>,
    by_place: HashMap<InPlace, ServerId>,
}

#[derive(Debug)]
struct Entry {
    spec: Arc<ServerSpec>,
    lease_end: Instant,
    draining: bool,
    suspect_until: Option<Instant>,
}

/// A server that left the pool.
#[derive(Clone, Debug)]
pub(crate) struct Gone {
    /// Its id.
    pub(crate) id: ServerId,
    /// What it was.
    pub(crate) spec: Arc<ServerSpec>,
    /// True when it had been told to drain.
    pub(crate) drained: bool,
    /// Why it left, for people: `its lease ended`.
    pub(crate) why: &'static str,
}

/// A server that takes tasks.
pub type Candidate = (ServerId, Arc<ServerSpec>);

/// A server, its state and what is left of its lease.
#[derive(Clone, Debug)]
pub struct PoolEntry {
    /// Its id.
    pub id: ServerId,
    /// What it said of itself.
    pub spec: Arc<ServerSpec>,
    /// True when it has been told to drain.
    pub draining: bool,
    /// True when a rank gave it up and it has not proved itself alive since.
    pub suspect: bool,
    /// Time until its lease ends.
    pub lease_left: Duration,
}

impl Pool {
    /// An empty pool whose ids start at `first_id`.
    pub(crate) fn new(lease: Duration, max_servers: usize, first_id: u64) -> Pool {
        let (servers, by_address, by_place) = Default::default();
        Pool { lease, max_servers, next_id: first_id, servers, by_address, by_place }
    }

    /// Adds a server, in the place of older ones with the same address or the same rank of the same job.
    pub(crate) fn register(
        &mut self,
        spec: ServerSpec,
        now: Instant,
    ) -> Result<(ServerId, Vec<Gone>), Error> {
        spec.check()?;
        let same_address = self.by_address.get(&spec.address).copied();
        let same_place = spec.in_place.as_ref().and_then(|place| self.by_place.get(place).copied());
        let mut replaced: Vec<_> = same_address.into_iter().chain(same_place).collect();
        replaced.dedup();
        if self.servers.len() - replaced.len() >= self.max_servers {
            let count = servers(self.servers.len());
            let message =
                format!("the pool is full with {count}; raise the coordinator's limit or drain some");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let gone = replaced.into_iter().filter_map(|id| self.remove(id, "it registered anew")).collect();
        let id = ServerId(self.next_id);
        self.next_id += 1;
        self.by_address.insert(spec.address.clone(), id);
        if let Some(place) = &spec.in_place {
            self.by_place.insert(place.clone(), id);
        }
        let entry =
            Entry { spec: Arc::new(spec), lease_end: now + self.lease, draining: false, suspect_until: None };
        self.servers.insert(id, entry);
        Ok((id, gone))
    }

    /// The address of the live server in this place, if it is another one.
    pub(crate) fn live_elsewhere(&self, place: &InPlace, address: &str, now: Instant) -> Option<&str> {
        let entry = self.servers.get(self.by_place.get(place)?)?;
        let other = entry.spec.address.as_str();
        (entry.lease_end > now && other != address).then_some(other)
    }

    /// Renews a lease. True when the server should drain.
    pub(crate) fn heartbeat(&mut self, id: ServerId, now: Instant) -> Result<bool, Error> {
        let lease = self.lease;
        let entry = self.servers.get_mut(&id).filter(|e| e.lease_end > now).ok_or_else(|| unknown(id))?;
        entry.lease_end = now + lease;
        if entry.suspect_until.is_some_and(|until| until <= now) {
            entry.suspect_until = None;
        }
        Ok(entry.draining)
    }

    /// Takes a server out of new plans for good.
    pub(crate) fn drain(&mut self, id: ServerId) -> Result<(), Error> {
        self.servers.get_mut(&id).ok_or_else(|| unknown(id))?.draining = true;
        Ok(())
    }

    /// Takes a server, if there is one of that id, out of new plans until it proves itself alive.
    pub(crate) fn suspect(&mut self, id: ServerId, now: Instant) {
        if let Some(entry) = self.servers.get_mut(&id) {
            entry.suspect_until = Some(now + self.lease);
        }
    }

    /// Removes the servers whose lease has ended.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Gone> {
        let late = self.servers.iter().filter(|(_, entry)| entry.lease_end <= now);
        let late: Vec<_> = late.map(|(&id, _)| id).collect();
        late.into_iter().filter_map(|id| self.remove(id, "its lease ended")).collect()
    }

    /// All servers in order of id.
    pub(crate) fn list(&self, now: Instant) -> Vec<PoolEntry> {
        let entry = |(&id, e): (&ServerId, &Entry)| PoolEntry {
            id,
            spec: e.spec.clone(),
            draining: e.draining,
            suspect: e.suspect_until.is_some(),
            lease_left: e.lease_end.saturating_duration_since(now),
        };
        self.servers.iter().map(entry).collect()
    }

    /// True for a server in the pool that is dedicated, or in place at a rank of the job.
    pub(crate) fn serves(&self, id: ServerId, job: &str) -> bool {
        self.servers.get(&id).is_some_and(|entry| entry.spec.serves(job))
    }

    /// The servers that take tasks of a job, in order of id: dedicated ones and those in place at its ranks.
    pub(crate) fn candidates(&self, job: &str) -> Vec<Candidate> {
        let takes = |e: &Entry| e.spec.serves(job) && !e.draining && e.suspect_until.is_none();
        self.servers.iter().filter(|(_, e)| takes(e)).map(|(&id, e)| (id, e.spec.clone())).collect()
    }

    fn remove(&mut self, id: ServerId, why: &'static str) -> Option<Gone> {
        let entry = self.servers.remove(&id)?;
        self.by_address.remove(&entry.spec.address);
        if let Some(place) = &entry.spec.in_place {
            self.by_place.remove(place);
        }
        Some(Gone { id, spec: entry.spec, drained: entry.draining, why })
    }
}

fn unknown(id: ServerId) -> Error {
    let message = format!(
        "server {id} is not in the pool (its lease ended, or the coordinator started anew); register again"
    );
    Error::new(ErrorKind::NotFound, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_attention::DType;

    const LEASE: Duration = Duration::from_secs(10);

    fn spec(address: &str, in_place: Option<(&str, u32)>) -> ServerSpec {
        ServerSpec {
            host: "host".into(),
            address: address.into(),
            socket: String::new(),
            device: "cpu".into(),
            memory_bytes: 1 << 20,
            numerics: BTreeMap::from([(DType::F32, "cpu-test".into())]),
            max_head_dim: 256,
            in_place: in_place.map(|(job, rank)| InPlace { job: job.into(), rank }),
        }
    }

    fn pool() -> (Pool, Instant) {
        (Pool::new(LEASE, 3, 1), Instant::now())
    }

    fn ids(pool: &Pool, job: &str) -> Vec<u64> {
        pool.candidates(job).iter().map(|(id, _)| id.0).collect()
    }

    #[test]
    fn a_server_stays_while_it_renews_its_lease() {
        let (mut pool, start) = pool();
        let (id, _) = pool.register(spec("a:1", None), start).unwrap();
        assert!(!pool.heartbeat(id, start + LEASE / 2).unwrap());
        assert!(pool.expire(start + LEASE).is_empty());
        let gone = pool.expire(start + LEASE * 3 / 2);
        assert_eq!((gone[0].id, gone[0].drained), (id, false));
        let error = pool.heartbeat(id, start + LEASE * 3 / 2).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.contains("register again"), "{error}");
        assert!(pool.list(start).is_empty());
    }

    #[test]
    fn a_heartbeat_after_the_lease_does_not_renew_it() {
        let (mut pool, start) = pool();
        let (id, _) = pool.register(spec("a:1", None), start).unwrap();
        assert_eq!(pool.heartbeat(id, start + LEASE).unwrap_err().kind, ErrorKind::NotFound);
    }

    #[test]
    fn an_address_or_a_place_registered_anew_replaces_the_older_server() {
        let (mut pool, start) = pool();
        let (first, _) = pool.register(spec("a:1", None), start).unwrap();
        let (second, gone) = pool.register(spec("a:1", Some(("job", 0))), start).unwrap();
        assert_eq!(gone.iter().map(|g| g.id).collect::<Vec<_>>(), [first]);
        let (third, gone) = pool.register(spec("b:1", Some(("job", 0))), start).unwrap();
        assert_eq!(gone.iter().map(|g| g.id).collect::<Vec<_>>(), [second]);
        assert_eq!(ids(&pool, "job"), [third.0]);
        // One that replaces two at once leaves neither behind.
        let (fourth, _) = pool.register(spec("c:1", None), start).unwrap();
        let (fifth, gone) = pool.register(spec("c:1", Some(("job", 0))), start).unwrap();
        assert_eq!(gone.iter().map(|g| g.id).collect::<Vec<_>>(), [fourth, third]);
        assert_eq!(ids(&pool, "job"), [fifth.0]);
        assert!(pool.expire(start + LEASE).iter().all(|g| g.id == fifth));
    }

    #[test]
    fn draining_and_suspect_servers_take_no_tasks() {
        let (mut pool, start) = pool();
        let (a, _) = pool.register(spec("a:1", None), start).unwrap();
        let (b, _) = pool.register(spec("b:1", None), start).unwrap();
        pool.drain(a).unwrap();
        pool.suspect(b, start);
        assert!(ids(&pool, "job").is_empty());
        assert!(pool.heartbeat(a, start + LEASE / 2).unwrap(), "a draining server is told so");
        pool.heartbeat(b, start + LEASE / 2).unwrap();
        assert!(ids(&pool, "job").is_empty(), "too early to trust it again");
        pool.heartbeat(b, start + LEASE).unwrap();
        assert_eq!(ids(&pool, "job"), [b.0]);
        assert_eq!(pool.drain(ServerId(99)).unwrap_err().kind, ErrorKind::NotFound);
    }

    #[test]
    fn in_place_servers_serve_their_own_job_only() {
        let (mut pool, start) = pool();
        pool.register(spec("a:1", Some(("one", 0))), start).unwrap();
        pool.register(spec("b:1", Some(("two", 0))), start).unwrap();
        pool.register(spec("c:1", None), start).unwrap();
        assert_eq!((ids(&pool, "one"), ids(&pool, "two")), (vec![1, 3], vec![2, 3]));
        let error = pool.register(spec("d:1", None), start).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
    }

    #[test]
    fn what_cannot_be_a_server_is_refused_by_field() {
        let (mut pool, start) = pool();
        let good = || spec("a:1", None);
        let of_f32 = |id: &str| BTreeMap::from([(DType::F32, id.to_owned())]);
        let cases = [
            ("server.address", ServerSpec { address: "nowhere".into(), ..good() }),
            ("server.address", ServerSpec { address: "host:0".into(), ..good() }),
            ("server.address", ServerSpec { address: ":80".into(), ..good() }),
            ("server.address", ServerSpec { address: "host:99999".into(), ..good() }),
            ("server.numerics_ids of f32", ServerSpec { numerics: of_f32(""), ..good() }),
            ("server.numerics_ids of f32", ServerSpec { numerics: of_f32("x\n"), ..good() }),
            ("server.memory_bytes", ServerSpec { memory_bytes: 0, ..good() }),
            ("server.dtypes", ServerSpec { numerics: BTreeMap::new(), ..good() }),
            ("server.max_head_dim", ServerSpec { max_head_dim: 0, ..good() }),
            ("server.host", ServerSpec { host: "h".repeat(300), ..good() }),
            ("server.job", spec("a:1", Some(("", 0)))),
        ];
        for (field, bad) in cases {
            let error = pool.register(bad, start).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains(field), "{field}: {error}");
        }
        assert!(pool.list(start).is_empty());
    }
}
