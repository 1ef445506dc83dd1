//! The batching policy: which ready tasks are computed together next. Pure.

/// What the policy knows of a ready task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ready {
    /// True when it came over the network, since its home then waits for transfer as well as computation, or when it has
    /// waited for long already.
    pub urgent: bool,
    /// Its work.
    pub flops: f64,
}

/// Chooses the next batch from the ready tasks, oldest first: urgent ones before the others, each in order of arrival, until the batch holds `max_flops`. A batch ends early rather than hold much more, so that a task that
/// arrives meanwhile does not wait long; but it always holds at least one task.
///
/// Returns indices into `ready`, in ascending order.
pub fn next_batch(ready: &[Ready], max_flops: f64) -> Vec<usize> {
    let urgent_first =
        (0..ready.len()).filter(|&i| ready[i].urgent).chain((0..ready.len()).filter(|&i| !ready[i].urgent));
    let mut batch = Vec::new();
    let mut flops = 0.0;
    for i in urgent_first {
        if !batch.is_empty() && flops + ready[i].flops > max_flops {
            break;
        }
        flops += ready[i].flops;
        batch.push(i);
    }
    batch.sort_unstable();
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ready: &[(bool, f64)], max_flops: f64, expected: &[usize]) {
        let ready: Vec<_> = ready.iter().map(|&(urgent, flops)| Ready { urgent, flops }).collect();
        assert_eq!(next_batch(&ready, max_flops), expected);
    }

    #[test]
    fn nothing_ready_gives_no_batch() {
        check(&[], 10.0, &[]);
    }

    #[test]
    fn a_task_above_the_limit_goes_alone() {
        check(&[(false, 100.0), (false, 1.0)], 10.0, &[0]);
    }

    #[test]
    fn urgent_tasks_go_before_older_ones() {
        check(&[(false, 4.0), (true, 4.0), (false, 4.0), (true, 4.0)], 9.0, &[1, 3]);
        check(&[(false, 4.0), (true, 4.0), (false, 4.0), (true, 4.0)], 12.0, &[0, 1, 3]);
    }

    #[test]
    fn a_batch_never_skips_an_older_task_for_a_smaller_one() {
        check(&[(true, 6.0), (true, 6.0), (true, 1.0)], 10.0, &[0]);
    }
}
