//! Documents of a step, and parts of them that devices compute by themselves.

use outboard_attention::Direction;
use outboard_planner::TaskShape;

use crate::setting::Setting;

/// Rows of a causal document, with all the keys that they see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Piece {
    pub(crate) fn rows(self) -> usize {
        self.end - self.start
    }

    /// Cells of one kv head.
    pub(crate) fn cells(self) -> u64 {
        cells(self.end) - cells(self.start)
    }

    /// Predicted seconds of a device, forward and backward.
    pub(crate) fn seconds(self, setting: &Setting<'_>) -> [f64; 2] {
        let heads = &setting.heads;
        let shape = TaskShape {
            rows: self.rows() * heads.group(),
            keys: self.end,
            cells: self.cells() * heads.kv_heads() as u64,
        };
        [Direction::Forward, Direction::Backward].map(|direction| setting.seconds(direction, shape))
    }
}

/// Cells of one kv head of a causal document.
pub(crate) fn cells(tokens: usize) -> u64 {
    let tokens = tokens as u64;
    tokens * (tokens + 1) / 2
}

/// What one device computes of some documents.
#[derive(Clone, Debug, Default)]
pub(crate) struct Share {
    pub(crate) tokens: u64,
    /// Of one kv head.
    pub(crate) cells: u64,
    /// Forward and backward.
    pub(crate) seconds: [f64; 2],
}

impl Share {
    pub(crate) fn add(&mut self, piece: Piece, setting: &Setting<'_>) {
        let [forward, backward] = piece.seconds(setting);
        self.tokens += piece.rows() as u64;
        self.cells += piece.cells();
        self.seconds[0] += forward;
        self.seconds[1] += backward;
    }
}

impl Share {
    /// Adds rows whose keys come in `before` chunks of as many keys as there are rows, and then their own.
    fn add_by_chunk(&mut self, piece: Piece, before: usize, setting: &Setting<'_>) {
        let heads = &setting.heads;
        let rows = piece.rows();
        let own = Piece { start: 0, end: rows }.seconds(setting);
        let shape = TaskShape {
            rows: rows * heads.group(),
            keys: rows,
            cells: (rows * rows * heads.kv_heads()) as u64,
        };
        self.tokens += rows as u64;
        self.cells += piece.cells();
        for (n, direction) in [Direction::Forward, Direction::Backward].into_iter().enumerate() {
            self.seconds[n] += own[n] + before as f64 * setting.seconds(direction, shape);
        }
    }
}

/// The keys of a document that come to a rank at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arriving {
    /// All that its rows see.
    AtOnce,
    /// Those of one chunk: rows and keys of every two chunks are a task of their own.
    ByChunk,
}

/// Every document in chunks of equal rows, two for each of `ranks` ranks: rank `i` has chunks `i` and `2 ranks - 1 - i`.
/// A document of fewer rows goes whole to the rank with the fewest tokens.
pub(crate) fn by_document(
    documents: &[usize],
    ranks: usize,
    arriving: Arriving,
    setting: &Setting<'_>,
) -> Vec<Share> {
    let mut shares = vec![Share::default(); ranks];
    let chunks = 2 * ranks;
    for &tokens in documents {
        if tokens < chunks || ranks == 1 {
            let least = (0..ranks).min_by_key(|&rank| shares[rank].tokens).unwrap_or(0);
            shares[least].add(Piece { start: 0, end: tokens }, setting);
            continue;
        }
        let border = |chunk: usize| tokens * chunk / chunks;
        for (rank, share) in shares.iter_mut().enumerate() {
            for chunk in [rank, chunks - 1 - rank] {
                let piece = Piece { start: border(chunk), end: border(chunk + 1) };
                match arriving {
                    Arriving::AtOnce => share.add(piece, setting),
                    Arriving::ByChunk => share.add_by_chunk(piece, chunk, setting),
                }
            }
        }
    }
    shares
}

/// A packed sequence in chunks of equal tokens, two for each of `ranks` ranks, whatever documents they cut.
pub(crate) fn by_sequence(sequence: &[usize], ranks: usize, setting: &Setting<'_>) -> Vec<Share> {
    let mut shares = vec![Share::default(); ranks];
    let (tokens, chunks) = (sequence.iter().sum::<usize>(), 2 * ranks);
    let border = |chunk: usize| tokens * chunk / chunks;
    let (mut at, mut chunk) = (0, 0);
    for &length in sequence {
        let (first, end) = (at, at + length);
        while at < end {
            while border(chunk + 1) <= at {
                chunk += 1;
            }
            let until = border(chunk + 1).min(end);
            let rank = if chunk < ranks { chunk } else { chunks - 1 - chunk };
            shares[rank].add(Piece { start: at - first, end: until - first }, setting);
            at = until;
        }
    }
    shares
}
