//! Pinning this process to cores, as a rank owns its device.

use anyhow::{Context, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Cores that this process may run on, ascending.
pub(crate) fn available() -> anyhow::Result<Vec<usize>> {
    let set = sched_getaffinity(None).context("cannot read which cores this process may run on")?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

/// The cores of owner `index` when each owner takes `each` of `available`: a share of its own while they last, then
/// shared in turn. Never empty for a non-empty `available`.
pub(crate) fn share(available: &[usize], index: usize, each: usize) -> Vec<usize> {
    let each = each.clamp(1, available.len().max(1));
    let shares = (available.len() / each).max(1);
    available.chunks(each).nth(index % shares).unwrap_or_default().to_vec()
}

/// Pins this process's calling thread, and every thread it starts from now on, to `cores`.
pub(crate) fn pin(cores: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for &core in cores {
        if core >= CpuSet::MAX_CPU {
            bail!("core {core} does not exist; cores are numbered from 0 to {}", CpuSet::MAX_CPU - 1);
        }
        set.set(core);
    }
    sched_setaffinity(None, &set).with_context(|| format!("cannot pin this process to cores {cores:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_take_cores_of_their_own_while_they_last() {
        let cores = [3, 4, 5, 9, 11];
        assert_eq!(share(&cores, 0, 2), [3, 4]);
        assert_eq!(share(&cores, 1, 2), [5, 9]);
        assert_eq!(share(&cores, 2, 2), [3, 4], "the odd core left over is nobody's");
        assert_eq!(share(&cores, 7, 1), [5]);
        assert_eq!(share(&cores, 0, 9), cores);
    }
}
