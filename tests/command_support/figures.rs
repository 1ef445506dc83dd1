//! A run's figures, computed again from what its step lines say of each rank.

use std::collections::BTreeMap;

use serde_json::Value;

/// One rank of one step.
struct Rank {
    attention: f64,
    rest: f64,
    cells: f64,
    documents: Vec<f64>,
}

/// Sums over steps, from which the summary's figures follow.
#[derive(Debug, Default)]
pub struct Sums {
    pub steps: f64,
    pub local: f64,
    pub ideal: f64,
    pub wlb: f64,
    pub wlb_token_imbalance: f64,
    pub predicted: f64,
    pub measured: f64,
    /// Most over mean cells of a rank.
    pub imbalance: f64,
}

/// The step lines of one training.
fn steps<'a>(lines: &'a [Value], attention: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == "step" && line["attention"] == attention).collect()
}

fn ranks(step: &Value) -> Vec<Rank> {
    let of = |rank: &Value| {
        let number = |key: &str| rank[key].as_f64().unwrap();
        let attention = number("attention_seconds");
        let documents = rank["documents"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
        let rest = number("seconds") - number("wait_seconds") - attention;
        Rank { attention, rest, cells: number("cells"), documents }
    };
    step["ranks"].as_array().unwrap().iter().map(of).collect()
}

/// Cells that the plan of a pooled step puts on each rank's own server.
fn planned(step: &Value) -> BTreeMap<u64, f64> {
    let mut cells: BTreeMap<u64, f64> = BTreeMap::new();
    for rank in step["ranks"].as_array().unwrap() {
        for placed in rank["placed"].as_array().unwrap() {
            let server = placed["rank"].as_u64().expect("an in-place server");
            *cells.entry(server).or_default() += placed["cells"].as_f64().unwrap();
        }
    }
    cells
}

/// Tokens and cells of each rank when the longest document always goes to the rank with the fewest cells.
fn packed(ranks: &[Rank]) -> Vec<(f64, f64)> {
    let mut documents: Vec<f64> = ranks.iter().flat_map(|rank| rank.documents.clone()).collect();
    documents.sort_by(|a, b| b.total_cmp(a));
    let mut packed: Vec<(f64, f64)> = vec![(0.0, 0.0); ranks.len()];
    for tokens in documents {
        let least = packed.iter_mut().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        *least = (least.0 + tokens, least.1 + tokens * (tokens + 1.0) / 2.0);
    }
    packed
}

fn most(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, f64::max)
}

/// Sums up a run in place.
pub fn sums(lines: &[Value]) -> Sums {
    let mut sums = Sums::default();
    let (mut most_cells, mut mean_cells, mut most_tokens, mut mean_tokens) = (0.0, 0.0, 0.0, 0.0);
    for (local, pool) in steps(lines, "local").into_iter().zip(steps(lines, "pool")) {
        assert_eq!(local["step"], pool["step"]);
        let (planned, pool) = (planned(pool), self::ranks(pool));
        let ranks = ranks(local);
        let count = ranks.len() as f64;
        let attention: f64 = ranks.iter().map(|rank| rank.attention).sum();
        let rest: f64 = ranks.iter().map(|rank| rank.rest).sum();
        let cells: f64 = ranks.iter().map(|rank| rank.cells).sum();
        assert_eq!(planned.values().sum::<f64>(), cells, "the plan computes every cell once");
        let share = |n: usize| planned.get(&(n as u64)).unwrap_or(&0.0) / cells;

        sums.steps += 1.0;
        sums.local += most(ranks.iter().map(|rank| rank.rest + rank.attention));
        sums.ideal += most(ranks.iter().map(|rank| rank.rest + attention / count));
        sums.predicted += most(ranks.iter().enumerate().map(|(n, rank)| rank.rest + attention * share(n)));
        sums.measured += most(pool.iter().map(|rank| rank.rest + rank.attention));
        let work = packed(&ranks);
        let (tokens, cells_packed) = work.iter().fold((0.0, 0.0), |sum, w| (sum.0 + w.0, sum.1 + w.1));
        sums.wlb += most(work.iter().map(|w| rest * w.0 / tokens + attention * w.1 / cells_packed));
        most_tokens += most(work.iter().map(|w| w.0));
        mean_tokens += tokens / count;
        most_cells += most(ranks.iter().map(|rank| rank.cells));
        mean_cells += cells / count;
    }
    sums.imbalance = most_cells / mean_cells;
    sums.wlb_token_imbalance = most_tokens / mean_tokens;
    sums
}
