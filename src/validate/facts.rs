//! Single figures of the paper, each under assumptions that are printed with it.

use outboard_simulator::{Layout, Mix, Policy, Scenario, simulate};

use super::cases::Published;

/// A published share or gain, and what is predicted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fact {
    pub(super) what: String,
    pub(super) published: &'static str,
    pub(super) predicted: f64,
    /// Under what.
    pub(super) assumed: &'static str,
}

const K: u64 = 1024;

pub(super) fn facts(published: &Published) -> anyhow::Result<Vec<Fact>> {
    let common = published.common("llama-8b", Mix::Pretrain)?;
    let on = |nodes: u32, context: Option<u32>, tokens: u64| Scenario {
        layout: Layout { context, ..Layout::new(8 * nodes, 8) },
        tokens,
        context: common.context.min(tokens as usize),
        ..common.clone()
    };
    let mut facts = Vec::new();
    for (replicas, published) in [(4, "19%"), (8, "55%")] {
        let scenario = Scenario { mix: Mix::Prolong, ..on(8, Some(8 / replicas), 4096 * K) };
        let outcome = simulate(&scenario, Policy::Wlb)?;
        facts.push(Fact {
            what: format!("idle for imbalance, WLB at 512K on {replicas} replicas"),
            published,
            predicted: outcome.account.imbalance / outcome.seconds,
            assumed: "8B, prolong, 4M tokens on 8 nodes, the nodes of a replica share its sequences; of 1M, 2M, 4M and 8M tokens those that come nearest",
        });
    }
    for (nodes, published) in [(2, "3%"), (32, "about 40%")] {
        let outcome = simulate(&on(nodes, Some(nodes), u64::from(nodes) * 32 * K), Policy::Cp)?;
        facts.push(Fact {
            what: format!("all-gather of context parallelism on {nodes} nodes"),
            published,
            predicted: outcome.account.exposed / outcome.seconds,
            assumed: "8B, pretrain, all nodes share every sequence, 32K tokens a node, documents of up to 512K",
        });
    }
    for nodes in [8, 16, 32] {
        let two = on(nodes, None, u64::from(nodes) * 128 * K);
        let one = Scenario { nano_batches: 1, ..two.clone() };
        let [one, two] = [simulate(&one, Policy::Distca)?, simulate(&two, Policy::Distca)?];
        facts.push(Fact {
            what: format!("one stream in place of ping-pong on {nodes} nodes"),
            published: "10-17% longer",
            predicted: one.seconds / two.seconds - 1.0,
            assumed: "8B, pretrain 512K, 128K tokens a node",
        });
    }
    Ok(facts)
}
