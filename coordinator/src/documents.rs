//! What a rank may submit.

use std::collections::BTreeSet;
use std::sync::Arc;

use outboard_attention::{Document, HeadGeometry, Span};
use outboard_proto::{ErrorKind, MAX_KEY_HOMES};

use crate::Error;

/// Ticks are numbered below this.
const MAX_TICKS: u32 = 1 << 12;
/// Most home ranges of one document: a task may name the homes of all its keys.
const MAX_HOMES: usize = MAX_KEY_HOMES;

/// What decides which documents a run's ranks may submit.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// The job's name.
    pub(crate) name: Arc<str>,
    /// How many ranks it has.
    pub(crate) ranks: u32,
    /// Heads of its layers.
    pub(crate) geometry: HeadGeometry,
    /// True when documents may come without homes, or with several.
    pub(crate) places: bool,
}

impl Facts {
    /// The most of a kind that one submission may hold, where a rank has so many of its own. In a job with placement one
    /// rank may speak for all.
    pub(crate) fn most(&self, of_a_rank: usize) -> usize {
        if self.places { of_a_rank.saturating_mul(self.ranks as usize) } else { of_a_rank }
    }
}

/// Checks a rank's documents of a step. `of_a_rank` is how many a rank may have of its own.
pub(crate) fn check_documents(
    documents: &[Document],
    rank: u32,
    facts: &Facts,
    of_a_rank: usize,
) -> Result<(), Error> {
    let most = facts.most(of_a_rank);
    if documents.len() > most {
        return Err(Error::invalid(format!(
            "documents holds {} entries; a rank submits at most {most} a step",
            documents.len()
        )));
    }
    let mut ids = BTreeSet::new();
    for (n, document) in documents.iter().enumerate() {
        let id = document.id();
        if id.rank != rank {
            let message = format!(
                "documents[{n}].id.rank is {}; a rank's documents carry its own number, {rank}",
                id.rank
            );
            return Err(Error::invalid(message));
        }
        if !ids.insert(id) {
            return Err(Error::invalid(format!(
                "documents[{n}].id is {id}, as another one's; ids are unique in a step"
            )));
        }
        let checked = check_homes(document, facts).and_then(|()| check_cells(document, &facts.geometry));
        checked.map_err(|e| e.context(format_args!("documents[{n}] ({id})")))?;
    }
    Ok(())
}

fn check_homes(document: &Document, facts: &Facts) -> Result<(), Error> {
    let homes = document.homes();
    if let Some(home) = homes.iter().find(|home| home.rank >= facts.ranks) {
        return Err(Error::invalid(format!(
            "homes name rank {}; the job has {} ranks",
            home.rank, facts.ranks
        )));
    }
    if homes.len() > MAX_HOMES {
        let count = homes.len();
        return Err(Error::invalid(format!("homes holds {count} ranges; at most {MAX_HOMES} fit")));
    }
    let unsupported = |message| Err(Error::new(ErrorKind::Unsupported, message));
    match document.sole_home() {
        _ if facts.places => Ok(()),
        Some(_) => Ok(()),
        None if homes.is_empty() => unsupported(
            "homes is empty, and the job does not declare placement: name the document's home, or join with placement",
        ),
        None => unsupported(
            "homes name several ranks, and the job does not declare placement: give it one home, or join with placement",
        ),
    }
}

fn check_cells(document: &Document, geometry: &HeadGeometry) -> Result<(), Error> {
    if document.tick() >= MAX_TICKS {
        return Err(Error::invalid(format!(
            "tick is {}; ticks are numbered below {MAX_TICKS}",
            document.tick()
        )));
    }
    if document.is_causal() {
        return Ok(());
    }
    let heads = Span::to(geometry.kv_heads());
    // All parts as given: clipping to the geometry would hide what lies beyond.
    for (n, part) in document.mask(usize::MAX).parts().iter().enumerate() {
        if !heads.covers(part.kv_heads) {
            let message = format!(
                "mask[{n}].kv_heads {} reaches outside the geometry's kv heads {heads}",
                part.kv_heads
            );
            return Err(Error::invalid(message));
        }
    }
    Ok(())
}
