//! Order and reduction groups: in which order partial dK and dV are summed.

use outboard_attention::PlannedTask;

use crate::PlanError;
use crate::sheet::{Sheet, Strip};

/// Turns the pieces of all slots into a tick's tasks, ordered by document, kv heads, slot, home, rows and keys. Tasks
/// of one document, kv-head range, slot and home rank form a group, which one client ships together; group numbers go on from `next_group`.
///
/// # Errors
/// [`PlanError::TooManyTasks`] when group numbers run out.
pub(crate) fn tasks(
    sheets: &[Sheet<'_>],
    pieces: &[Vec<Strip>],
    next_group: &mut u32,
) -> Result<Vec<PlannedTask>, PlanError> {
    let mut placed: Vec<(u32, Strip)> = Vec::with_capacity(pieces.iter().map(Vec::len).sum());
    for (slot, strips) in (0..).zip(pieces) {
        placed.extend(strips.iter().map(|strip| (slot, *strip)));
    }
    // Sheets lie in order of documents and heads.
    let group_key = |(slot, strip): &(u32, Strip)| {
        (strip.sheet, strip.kv_heads, *slot, home_of(&sheets[strip.sheet], strip))
    };
    placed.sort_unstable_by_key(|placed| (group_key(placed), placed.1.q, placed.1.kv));
    let mut tasks = Vec::with_capacity(placed.len());
    for members in placed.chunk_by(|a, b| group_key(a) == group_key(b)) {
        let group = *next_group;
        *next_group = group.checked_add(1).ok_or(PlanError::TooManyTasks { max: u32::MAX })?;
        for (position, (slot, strip)) in (0..).zip(members) {
            let sheet = &sheets[strip.sheet];
            tasks.push(PlannedTask {
                document: sheet.document.id(),
                q: strip.q,
                kv: strip.keys(sheets),
                kv_heads: strip.kv_heads,
                slot: *slot,
                group,
                position,
            });
        }
    }
    Ok(tasks)
}

/// The rank that is home of a strip's rows; `None` where none is known.
fn home_of(sheet: &Sheet<'_>, strip: &Strip) -> Option<u32> {
    let homes = sheet.document.homes();
    let n = homes.partition_point(|home| home.tokens.end() <= strip.q.start());
    homes.get(n).map(|home| home.rank)
}
