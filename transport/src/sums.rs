//! Sums of reduction groups: the gradients of keys that tasks of one group share are added up where they were computed,
//! and delivered once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_attention::{Direction, Span};
use outboard_proto::{ErrorKind, LayerRef, RetryHint, TaskError, TaskHeader};
use tokio::sync::watch;

use crate::Homes;

/// Names a sum among those of one client: a group of one layer.
pub(crate) type SumKey = (LayerRef, u32);

/// Tasks of one group that were sent together.
#[derive(Debug)]
pub(crate) struct GroupSum {
    tasks: usize,
    parts: Mutex<Vec<Part>>,
    /// How it ended.
    ended: watch::Sender<Option<Result<(), TaskError>>>,
}

/// One task's dK and dV, `[kv, kv heads, dim]`.
#[derive(Debug)]
struct Part {
    position: u32,
    kv: Span,
    gradients: [Vec<f32>; 2],
}

/// What is delivered to homes together.
#[derive(Debug)]
pub(crate) struct Delivery {
    /// The keys.
    pub(crate) kv: Span,
    /// Place in the group of the task, or of the first one that was added up.
    pub(crate) position: u32,
    /// The keys of each task that was added up; none for one alone.
    pub(crate) summed: Vec<Span>,
    /// dK and dV, `[kv, kv heads, dim]`.
    pub(crate) gradients: [Vec<f32>; 2],
}

/// A task's place in a sum. A sum whose tasks do not all give their parts fails for all of them.
#[derive(Debug)]
pub(crate) struct Member(Option<Arc<GroupSum>>);

/// The sums of one stream whose tasks have not all been announced.
#[derive(Debug, Default)]
pub(crate) struct Sums(HashMap<SumKey, (Arc<GroupSum>, usize)>);

/// The sum that a task is part of, as its client says; `None` for a task whose gradients go alone.
pub(crate) fn sum_of(header: &TaskHeader) -> Option<SumKey> {
    let homes = !header.key_homes.is_empty() && header.direction == Direction::Backward;
    (homes && header.group_tasks > 1).then(|| (header.key_range(Span::default()).layer, header.group))
}

/// How many tasks of each sum are among `headers`.
pub(crate) fn counted<'a>(headers: impl Iterator<Item = &'a TaskHeader>) -> HashMap<SumKey, u32> {
    let mut counts = HashMap::new();
    for key in headers.filter_map(sum_of) {
        *counts.entry(key).or_default() += 1;
    }
    counts
}

impl Sums {
    /// Fails the sums whose tasks have not all been announced: no more will be.
    pub(crate) fn end(&mut self) {
        for (sum, _) in std::mem::take(&mut self.0).into_values() {
            let message = "the stream ended before all tasks of its reduction group had come";
            sum.end(Err(TaskError::new(ErrorKind::Corrupt, message)));
        }
    }

    /// The place of a task that has been announced; `None` for one whose gradients go alone.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there are `most` sums already.
    pub(crate) fn member(&mut self, header: &TaskHeader, most: usize) -> Result<Option<Member>, TaskError> {
        let Some(key) = sum_of(header) else { return Ok(None) };
        if self.0.len() >= most && !self.0.contains_key(&key) {
            let message = format!("{most} groups of this stream wait for their tasks; send whole groups");
            return Err(TaskError::new(ErrorKind::Busy, message));
        }
        let tasks = header.group_tasks as usize;
        let (sum, announced) = self.0.entry(key.clone()).or_insert_with(|| (GroupSum::new(tasks), 0));
        *announced += 1;
        let (member, whole) = (sum.member(), *announced >= sum.tasks);
        if whole {
            self.0.remove(&key);
        }
        Ok(Some(member))
    }
}

impl GroupSum {
    pub(crate) fn new(tasks: usize) -> Arc<GroupSum> {
        let (ended, _) = watch::channel(None);
        Arc::new(GroupSum { tasks, parts: Mutex::default(), ended })
    }

    pub(crate) fn member(self: &Arc<Self>) -> Member {
        Member(Some(Arc::clone(self)))
    }

    fn end(&self, how: Result<(), TaskError>) {
        let failed = how.is_err();
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(how);
            first
        });
        if failed {
            // Their tasks give their memory back now.
            self.parts().clear();
        }
    }

    /// Takes a part; gives back all of them once they are there.
    fn add(&self, part: Part) -> Result<Option<Vec<Part>>, TaskError> {
        let mut parts = self.parts();
        if let Some(Err(error)) = &*self.ended.borrow() {
            return Err(error.clone());
        }
        if parts.iter().any(|other| other.position == part.position) {
            let position = part.position;
            return Err(TaskError::invalid(format!(
                "two tasks of its reduction group are number {position}"
            )));
        }
        parts.push(part);
        Ok((parts.len() >= self.tasks).then(|| std::mem::take(&mut *parts)))
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    /// Gives the task's dK and dV; returns once the sum has been delivered, with the bytes that went over the network for
    /// it where this task was the last. Whoever is dropped meanwhile fails the sum.
    pub(crate) async fn give(
        mut self,
        homes: &Homes,
        header: &TaskHeader,
        gradients: [Vec<f32>; 2],
    ) -> Result<u64, TaskError> {
        let gone = || TaskError::internal("the sum of its reduction group is gone");
        let sum = self.0.clone().ok_or_else(gone)?;
        let part = Part { position: header.position, kv: header.task.kv(), gradients };
        let Some(parts) = sum.add(part)? else {
            let mut ended = sum.ended.subscribe();
            // Until then this task, too, is part of the sum.
            let outcome = ended.wait_for(Option::is_some).await.map_err(|_| gone())?.clone();
            self.0 = None;
            return outcome.ok_or_else(gone)?.map(|()| 0);
        };
        let outcome = deliver_sum(homes, header, parts).await;
        sum.end(outcome.as_ref().map(|_| ()).map_err(Clone::clone));
        self.0 = None;
        outcome
    }
}

async fn deliver_sum(homes: &Homes, header: &TaskHeader, parts: Vec<Part>) -> Result<u64, TaskError> {
    // It may take a while, and others' tensors must come and go meanwhile.
    let added = tokio::task::spawn_blocking(|| add_up(parts)).await;
    let added = added.map_err(|error| TaskError::internal(format!("adding gradients up failed: {error}")))?;
    let mut sent = 0;
    for delivery in added {
        sent += homes.deliver(header, delivery).await?;
    }
    Ok(sent)
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(sum) = self.0.take() {
            let message = "another task of its reduction group has no result, so that there is no sum";
            let error = TaskError::new(ErrorKind::Aborted, message);
            // That says nothing about the server: the others' own results may be had there.
            sum.end(Err(TaskError { retry: RetryHint::Later, ..error }));
        }
    }
}

/// Adds parts up in order of position, each element from zero. It takes no memory: the sum is made in the part that has
/// all keys of the others. Where none has, parts go alone.
fn add_up(mut parts: Vec<Part>) -> Vec<Delivery> {
    parts.sort_by_key(|part| part.position);
    let hull = parts.iter().map(|part| part.kv).reduce(Span::hull).unwrap_or_default();
    let first = parts.first().map_or(0, |part| part.position);
    let Some(widest) = parts.iter().position(|part| part.kv == hull) else {
        let alone =
            |Part { position, kv, gradients }| Delivery { kv, position, summed: Vec::new(), gradients };
        return parts.into_iter().map(alone).collect();
    };
    for tensor in 0..2 {
        let width = parts[widest].gradients[tensor].len() / hull.len().max(1);
        let mut sum = vec![0.0; width];
        for token in hull.iter() {
            sum.fill(0.0);
            for part in parts.iter().filter(|part| part.kv.contains(token)) {
                let row = part.gradients[tensor].get((token - part.kv.start()) * width..).unwrap_or_default();
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            let row = (token - hull.start()) * width;
            if let Some(row) = parts[widest].gradients[tensor].get_mut(row..row + width) {
                row.copy_from_slice(&sum);
            }
        }
    }
    let summed = parts.iter().map(|part| part.kv).collect();
    let gradients = parts.swap_remove(widest).gradients;
    vec![Delivery { kv: hull, position: first, summed, gradients }]
}

#[cfg(test)]
mod tests {
    use outboard_attention::TensorView;
    use outboard_attention::merge::{Corner, GradientPartial, sum_group};
    use proptest::prelude::*;

    use super::*;

    fn values(seed: u64, count: usize) -> Vec<f32> {
        let mut x = seed | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    proptest! {
        /// The bits of a sum at home, whoever makes it.
        #[test]
        fn sums_have_the_bits_of_those_made_at_home(
            spans in prop::collection::vec((0usize..40, 1usize..40), 1..6), widths in (1usize..5, 1usize..5), seed: u64,
        ) {
            let span = |&(start, len): &(usize, usize)| Span::at(start, len);
            let part = |(n, at): (usize, &(usize, usize))| Part {
                position: n as u32,
                kv: span(at),
                gradients: [widths.0, widths.1].map(|w| values(seed ^ (n as u64 * 977 + w as u64), w * at.1)),
            };
            let parts = || spans.iter().enumerate().map(part).collect::<Vec<_>>();
            let hull = spans.iter().map(span).reduce(Span::hull).unwrap();
            // In any order of arrival.
            let mut turned = parts();
            turned.reverse();
            let made = add_up(turned);
            if spans.iter().any(|at| span(at) == hull) {
                prop_assert!(made.len() == 1 && made[0].kv == hull && made[0].position == 0);
                prop_assert_eq!(made[0].summed.len(), spans.len());
                for (tensor, width) in [widths.0, widths.1].into_iter().enumerate() {
                    let parts = parts();
                    let partials: Vec<_> = parts.iter().map(|part| GradientPartial {
                        group: 0,
                        position: part.position,
                        at: Corner { row: part.kv.start(), head: 0 },
                        values: TensorView::contiguous("part", &part.gradients[tensor], [part.kv.len(), 1, width])
                            .unwrap(),
                    }).collect();
                    let (_, _, sum) = sum_group(&partials, width).unwrap();
                    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(&made[0].gradients[tensor]), bits(&sum));
                }
            } else {
                prop_assert_eq!(made.len(), spans.len());
                prop_assert!(made.iter().all(|delivery| delivery.summed.is_empty()));
            }
        }
    }
}
