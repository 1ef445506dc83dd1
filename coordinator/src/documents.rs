//! What a rank may submit.

use std::collections::BTreeSet;

use outboard_attention::{Document, HeadGeometry, Span};
use outboard_proto::ErrorKind;

use crate::Error;

/// Ticks are numbered below this.
const MAX_TICKS: u32 = 1 << 12;

/// Checks a rank's documents of a step.
pub(crate) fn check_documents(
    documents: &[Document],
    rank: u32,
    ranks: u32,
    geometry: &HeadGeometry,
    most: usize,
) -> Result<(), Error> {
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
        check_document(document, ranks, geometry)
            .map_err(|e| e.context(format_args!("documents[{n}] ({id})")))?;
    }
    Ok(())
}

fn check_document(document: &Document, ranks: u32, geometry: &HeadGeometry) -> Result<(), Error> {
    if let Some(home) = document.homes().iter().find(|home| home.rank >= ranks) {
        return Err(Error::invalid(format!("homes name rank {}; the job has {ranks} ranks", home.rank)));
    }
    if document.sole_home().is_none() {
        let message =
            "homes name several ranks; documents that span ranks are not supported yet: give it one home";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
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
