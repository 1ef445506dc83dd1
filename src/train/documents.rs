//! A step's documents as the planner sees them: on the ranks that they are dealt to, or without homes.

use anyhow::Context;
use outboard_attention::{Document, DocumentId, HomeRange, InvalidAttention, Span};
use outboard_planner::{Problem, Rates, Slot, Traffic, plan};
use outboard_trainer::{Packer, StepPacking};

use super::args::Run;

/// What documents would move where they are dealt to, in a run that places their tokens.
pub(super) struct FixedHomes<'a> {
    run: &'a Run,
    /// None where nothing is placed, the servers are not known, or a step could not be planned.
    packer: Option<Packer>,
}

impl<'a> FixedHomes<'a> {
    pub(super) fn new(run: &'a Run) -> anyhow::Result<FixedHomes<'a>> {
        let known = run.placement.is_some() && run.coordinator.is_none();
        let packer = known.then(|| Packer::new(run.corpus.clone(), &run.train)).transpose()?;
        Ok(FixedHomes { run, packer })
    }

    /// Bytes of all layers and both directions of a step, as predicted for a plan that leaves documents where they are
    /// dealt to. `None` where that is not known; an error is told once.
    pub(super) fn bytes(&mut self, step: u64) -> anyhow::Result<Option<u64>> {
        let Some(mut packer) = self.packer.take() else { return Ok(None) };
        let problem = problem(self.run, dealt(&packer.packing(step))?)?;
        let planned = plan(&problem).with_context(|| format!("step {step} with fixed homes"))?;
        let Traffic { forward, backward } = Traffic::of(&planned, &problem);
        self.packer = Some(packer);
        let layer = forward.total.saturating_add(backward.total);
        Ok(Some(layer.saturating_mul(self.run.model.layers as u64)))
    }
}

/// The documents dealt to one rank, at home there.
pub(super) fn of_rank(packing: &StepPacking, rank: u32) -> Result<Vec<Document>, InvalidAttention> {
    let document = |(index, tokens): (usize, usize)| {
        let id = DocumentId { rank, index: index as u32 };
        Document::new(id, tokens, vec![HomeRange { rank, tokens: Span::to(tokens) }])
    };
    packing.lengths(rank).into_iter().enumerate().map(document).collect()
}

/// Those of all ranks, each at home where it is dealt to.
pub(super) fn dealt(packing: &StepPacking) -> Result<Vec<Document>, InvalidAttention> {
    let mut all = Vec::new();
    for rank in (0..).take(packing.ranks.len()) {
        all.extend(of_rank(packing, rank)?);
    }
    Ok(all)
}

/// The same documents without homes, as rank 0 submits them for all.
pub(super) fn unplaced(packing: &StepPacking) -> Result<Vec<Document>, InvalidAttention> {
    packing.global_batch().map(|(id, file)| Document::unplaced(id, file.tokens)).collect()
}

/// A step of a run, as the coordinator plans it.
pub(super) fn problem(run: &Run, documents: Vec<Document>) -> anyhow::Result<Problem> {
    let rates = run.rates.map(Rates::from);
    Ok(Problem { rates, ..Problem::new(run.model.validate()?, documents, slots(run)) })
}

/// The slots that the job will have, where its servers are known: one a server, of equal weight.
pub(super) fn slots(run: &Run) -> Vec<Slot> {
    let ranks = if run.in_place { run.train.ranks } else { 0 };
    let dedicated = (0..run.dedicated).map(|_| Slot::dedicated());
    (0..ranks).map(Slot::in_place).chain(dedicated).collect()
}

#[cfg(test)]
mod tests {
    use outboard_trainer::PackedFile;

    use super::*;

    #[test]
    fn the_same_documents_are_dealt_and_placed() {
        let file = |tokens| PackedFile { file: 0, tokens };
        let packing = StepPacking {
            step: 0,
            ranks: vec![vec![file(5), file(3)], vec![], vec![file(8)]],
            truncated_documents: 0,
            dropped_tokens: 0,
        };
        let (dealt, unplaced) = (dealt(&packing).unwrap(), unplaced(&packing).unwrap());
        let tokens = |all: &[Document]| all.iter().map(Document::tokens).collect::<Vec<_>>();
        assert_eq!((tokens(&dealt), tokens(&unplaced)), (vec![5, 3, 8], vec![5, 3, 8]));
        assert_eq!(dealt.iter().map(Document::sole_home).collect::<Vec<_>>(), [Some(0), Some(0), Some(2)]);
        assert!(unplaced.iter().all(|document| !document.is_placed()));
        let ids: Vec<_> = unplaced.iter().map(Document::id).collect();
        assert_eq!(ids, [0, 1, 2].map(|index| DocumentId { rank: 0, index }));
    }
}
