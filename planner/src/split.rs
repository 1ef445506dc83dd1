//! Pieces: what a slot holds, cut into tasks. Cutting what stays on one slot costs no bytes.

use outboard_attention::Span;

use crate::cut::{round, step};
use crate::sheet::{Sheet, Strip};

/// A slot's work is at least this many pieces, none much larger than its part.
const PIECES: u64 = 8;

/// The pieces of one slot. Pieces of one document have the same kv heads or none in common.
pub(crate) fn split(sheets: &[Sheet<'_>], strips: &mut [Strip]) -> Vec<Strip> {
    let work: u64 = strips.iter().map(Strip::cells).sum();
    let parts =
        |cells: u64| (u128::from(cells) * u128::from(PIECES)).div_ceil(u128::from(work.max(1))) as usize;
    strips.sort_unstable_by_key(Strip::place);
    let mut pieces = Vec::with_capacity(strips.len() + PIECES as usize);
    for same in strips.chunk_by(|a, b| a.sheet == b.sheet) {
        if let [strip] = same
            && parts(strip.cells()) == 1
        {
            pieces.push(*strip);
            continue;
        }
        for bundle in bundles(sheets, same) {
            let cells = bundle.iter().map(Strip::cells).sum();
            let Some(kv_heads) = bundle.first().map(|strip| strip.kv_heads) else { continue };
            // Heads first, since a cut between heads changes no bit; rows where heads do not suffice.
            for heads in even(kv_heads, parts(cells)) {
                for strip in &bundle {
                    let strip = Strip { kv_heads: heads, ..*strip };
                    pieces.extend(by_rows(sheets, &strip, parts(strip.cells())));
                }
            }
        }
    }
    pieces
}

/// What a slot holds of one sheet, parted where any strip's kv heads begin or end: strips of the same kv heads, rows
/// ascending, neighbours of the same keys and home joined.
fn bundles(sheets: &[Sheet<'_>], strips: &[Strip]) -> Vec<Vec<Strip>> {
    let mut borders: Vec<usize> =
        strips.iter().flat_map(|s| [s.kv_heads.start(), s.kv_heads.end()]).collect();
    borders.sort_unstable();
    borders.dedup();
    let mut bundles = Vec::new();
    for pair in borders.windows(2) {
        let heads = Span::at(pair[0], pair[1] - pair[0]);
        let here = strips.iter().filter(|s| s.kv_heads.covers(heads));
        let Some(sheet) = here.clone().next().map(|strip| strip.sheet) else { continue };
        let mut rows: Vec<(Span, Span)> = here.map(|s| (s.kv, s.q)).collect();
        rows.sort_unstable();
        let joined = rows.into_iter().fold(Vec::new(), |mut joined: Vec<(Span, Span)>, (kv, q)| {
            match joined.last_mut() {
                Some((same, last))
                    if *same == kv && last.end() >= q.start() && one_home(&sheets[sheet], q.start()) =>
                {
                    *last = last.hull(q)
                }
                _ => joined.push((kv, q)),
            }
            joined
        });
        let strip = |(kv, q)| Strip::with_keys(sheets, sheet, heads, q, kv);
        let mut bundle: Vec<Strip> = joined.into_iter().filter_map(strip).collect();
        bundle.sort_unstable_by_key(Strip::place);
        bundles.push(bundle);
    }
    bundles
}

/// True when one rank is home of this row and of the one before it. A task's rows have one: it sends them, and gets their
/// outputs.
fn one_home(sheet: &Sheet<'_>, row: usize) -> bool {
    let homes = sheet.document.homes();
    let n = homes.partition_point(|home| home.tokens.end() < row);
    match homes.get(n..) {
        Some([before, after, ..]) if before.tokens.end() == row => before.rank == after.rank,
        _ => true,
    }
}

/// A range in up to `parts` parts whose sizes differ by one at most.
fn even(span: Span, parts: usize) -> impl Iterator<Item = Span> {
    let parts = parts.clamp(1, span.len().max(1));
    let border = move |n: usize| span.start() + span.len() * n / parts;
    (0..parts).filter_map(move |n| Span::new(border(n), border(n + 1)))
}

/// A strip in up to `parts` pieces of about equal work, cut between rows.
fn by_rows(sheets: &[Sheet<'_>], strip: &Strip, parts: usize) -> Vec<Strip> {
    let seen = sheets[strip.sheet].seen(strip.kv);
    let share = strip.unit / parts.max(1) as u64;
    let step = step(&seen, strip.q, share / 2);
    let mut pieces = Vec::new();
    let mut at = strip.q.start();
    for n in 1..=parts {
        let target = u128::from(strip.unit) * n as u128 / parts.max(1) as u128;
        let end = match n == parts {
            true => strip.q.end(),
            false => round(seen.end_of(strip.q.start(), target as u64), step).min(strip.q.end()),
        };
        if let Some(q) = Span::new(at, end)
            && let Some(piece) = strip.part(sheets, strip.kv_heads, q)
        {
            pieces.push(piece);
            at = end;
        }
    }
    pieces
}
