//! Small steps for the tests of what is shown of a plan.

use outboard_attention::{Document, DocumentId, HeadGeometry, HomeRange, Mask, Span};
use outboard_planner::{Problem, Slot};

fn document(index: u32, homes: &[(u32, usize)]) -> Document {
    let mut at = 0;
    let home = |&(rank, tokens): &(u32, usize)| {
        at += tokens;
        HomeRange { rank, tokens: Span::at(at - tokens, tokens) }
    };
    let homes: Vec<HomeRange> = homes.iter().map(home).collect();
    Document::new(DocumentId { rank: 0, index }, at, homes).unwrap()
}

/// So many ranks with a server each, the first with a long document, the others with a short one.
pub(super) fn in_place(ranks: u32) -> Problem {
    let tokens = |rank| if rank == 0 { 9001 } else { 700 };
    let documents = (0..ranks).map(|rank| document(rank, &[(rank, tokens(rank))])).collect();
    Problem::new(
        HeadGeometry::standard(8, 4, 64).unwrap(),
        documents,
        (0..ranks).map(Slot::in_place).collect(),
    )
}

/// Two ranks with a server and one without, a fast server of its own; two ticks, a document on two ranks, one with a
/// mask that differs between heads, and one of a single token.
pub(super) fn mixed() -> Problem {
    let window = Mask::sliding_window(3000, 255, Span::to(3)).unwrap();
    let full = Mask::full(3000, Span::at(3, 1)).unwrap();
    let mask = Mask::new([window.parts(), full.parts()].concat()).unwrap();
    let documents = vec![
        document(0, &[(0, 6000), (1, 2500)]),
        document(1, &[(2, 3000)]).with_mask(mask).unwrap(),
        document(2, &[(1, 1)]),
        document(3, &[(0, 5000)]).with_tick(1),
        document(4, &[(2, 1200)]).with_tick(1),
    ];
    let slots = vec![Slot::in_place(0), Slot::in_place(1), Slot { weight: 1.5, ..Slot::dedicated() }];
    Problem::new(HeadGeometry::standard(8, 4, 64).unwrap(), documents, slots)
}
