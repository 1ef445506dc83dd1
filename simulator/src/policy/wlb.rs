//! Variable-length packing of WLB-LLM (arXiv 2503.17924, sections on packing and on context parallelism), at its best: of
//! every number of ranks that share a sequence, and of every delay tried, what takes the least time, as DistCA's paper
//! (arXiv 2510.18121, evaluation) takes its baseline "WLB-ideal".
//!
//! Documents go longest first to the micro-batch with the least work if that has room, else to the one with the fewest
//! tokens if that has, and what is left to the one with the least work. Room is [`crate::Scenario::token_room`] times the mean number of tokens.
//! K and V of the ranks that share a document are gathered and kept, with copies of what each of a rank's two chunks sees, as
//! the code of WLB-LLM that DistCA's authors ran does.
//! Simplified: work is what the simulator itself predicts; a delay lets all documents of a few steps change places, not only
//! outliers, and steps take micro-batches of similar work together, which is at least as good as what WLB-LLM's queues do.

use super::alone::{Keys, apart};
use super::{Choice, Planned, by_context};
use crate::batch::{Arriving, Piece, Share, by_document, cells};
use crate::scenario::Sequences;
use crate::setting::Setting;

pub(super) fn choices(setting: &Setting<'_>, sequences: usize) -> Vec<Choice> {
    let most = setting.scenario.delay.min(setting.scenario.steps) as usize;
    let windows =
        std::iter::successors(Some(1), |window| Some(2 * window)).take_while(move |window| *window <= most);
    windows
        .flat_map(|window| {
            let layouts = by_context(setting.layout, sequences).into_iter();
            layouts.map(move |layout| Choice { window, ..Choice::of(layout) })
        })
        .collect()
}

/// A micro-batch that is being filled.
#[derive(Clone, Debug, Default)]
struct Bin {
    documents: Vec<usize>,
    tokens: usize,
    work: f64,
}

/// The steps of a window, each with bins of similar work.
pub(super) fn plan(setting: &Setting<'_>, window: &[Sequences]) -> Vec<Planned> {
    let ranks = setting.layout.context.unwrap_or(1) as usize;
    let replicas = setting.ranks() / ranks;
    let mut documents: Vec<usize> = window.iter().flatten().flatten().copied().collect();
    let of_replica = documents.len() / (window.len() * replicas);
    let micro_batches = (setting.layout.micro_batches as usize).min(of_replica).max(1);
    documents.sort_unstable_by(|a, b| b.cmp(a));
    let mut bins = packed(setting, &documents, replicas * micro_batches * window.len());
    bins.sort_by(|a, b| b.work.total_cmp(&a.work));
    let of_step = |bins: &[Bin]| {
        let mut dealt: Vec<Vec<Vec<Share>>> = vec![Vec::new(); replicas];
        // The heaviest bins of a step go to all replicas at one time.
        for (n, bin) in bins.iter().enumerate() {
            let round = n / replicas;
            let replica = if round.is_multiple_of(2) { n % replicas } else { replicas - 1 - n % replicas };
            dealt[replica].push(by_document(&bin.documents, ranks, Arriving::AtOnce, setting));
        }
        apart(setting, &dealt, Keys::Copied)
    };
    bins.chunks(replicas * micro_batches).map(of_step).collect()
}

fn packed(setting: &Setting<'_>, documents: &[usize], count: usize) -> Vec<Bin> {
    let token = setting.token_seconds();
    let room = documents.iter().sum::<usize>() as f64 / count as f64 * setting.scenario.token_room;
    let mut bins = vec![Bin::default(); count];
    let mut left = Vec::new();
    for &tokens in documents {
        let [forward, backward] = Piece { start: 0, end: tokens }.seconds(setting);
        let work = forward + backward + token * tokens as f64;
        let fits = |bin: &usize| (bins[*bin].tokens + tokens) as f64 <= room;
        let lightest = (0..count).min_by(|&a, &b| bins[a].work.total_cmp(&bins[b].work)).filter(fits);
        let emptiest = || (0..count).min_by_key(|&bin| (bins[bin].tokens, bin)).filter(fits);
        match lightest.or_else(emptiest) {
            Some(bin) => bins[bin].add(tokens, work),
            None => left.push((tokens, work)),
        }
    }
    for (tokens, work) in left {
        if let Some(bin) = (0..count).min_by(|&a, &b| bins[a].work.total_cmp(&bins[b].work)) {
            bins[bin].add(tokens, work);
        }
    }
    debug_assert_eq!(
        bins.iter().flat_map(|bin| &bin.documents).map(|&tokens| cells(tokens)).sum::<u64>(),
        documents.iter().map(|&tokens| cells(tokens)).sum::<u64>()
    );
    bins
}

impl Bin {
    fn add(&mut self, tokens: usize, work: f64) {
        self.documents.push(tokens);
        self.tokens += tokens;
        self.work += work;
    }
}
