use outboard_attention::{Document, HeadGeometry, HomeRange};
use outboard_proto::v1;

use super::*;

const ID: DocumentId = DocumentId { rank: 0, index: 0 };

fn span(start: usize, end: usize) -> Span {
    Span::new(start, end).unwrap()
}

/// A document of 100 tokens on two ranks, in one kv head: rank 0 has rows [0, 50), rank 1 the others in two tasks of one
/// group, each on its server.
fn plan_of(
    rank: u32,
    servers: [u64; 2],
    change: impl FnOnce(&mut Vec<PlannedTask>),
) -> Result<RankPlan, String> {
    let homes = [(0, span(0, 50)), (1, span(50, 100))].map(|(rank, tokens)| HomeRange { rank, tokens });
    let document = Document::new(ID, 100, homes.to_vec()).unwrap();
    let task = |q: Span, group: u32, position: u32| PlannedTask {
        document: ID,
        q,
        kv: Span::to(q.end()),
        kv_heads: Span::to(1),
        slot: 0,
        group,
        position,
    };
    let mut tasks = vec![task(span(0, 50), 0, 0), task(span(50, 75), 1, 0), task(span(75, 100), 1, 1)];
    change(&mut tasks);
    let servers_of = [servers[0], servers[0], servers[1]];
    let planned = |(n, task): (usize, &PlannedTask)| {
        v1::PlannedTask::from(&AssignedTask { tick: 0, server_id: servers_of[n.min(2)], task: *task })
    };
    let response = SubmitStepResponse {
        plan_epoch: 0,
        tasks: tasks.iter().enumerate().map(planned).collect(),
        servers: servers.iter().map(|&id| ServerInfo { id, ..ServerInfo::default() }).collect(),
        summary: Some(PlanSummary::default()),
        documents: vec![(&document).into()],
    };
    let submitted = if rank == 0 { vec![Document::unplaced(ID, 100).unwrap()] } else { Vec::new() };
    let geometry = HeadGeometry::standard(1, 1, 8).unwrap();
    let home_addresses = ["one:1".to_owned(), "two:2".to_owned()];
    let reading = Reading { rank, geometry: &geometry, slots: 1, home_addresses: &home_addresses };
    RankPlan::new(response, submitted, reading)
}

#[test]
fn a_rank_holds_its_rows_and_has_the_keys_before_them_fetched() {
    let plan = plan_of(1, [7, 7], |_| {}).unwrap();
    assert_eq!(plan.holdings, [Holding { document: ID, tokens: span(50, 100), length: 100, tick: 0 }]);
    let [first, second] = &plan.tasks[..] else { panic!("{:?}", plan.tasks) };
    assert_eq!((first.fetch, second.fetch), (Some(0), Some(0)), "one lot of keys for both");
    let homes: Vec<_> = plan.fetches[0].homes.iter().map(|h| (h.rank, h.tokens, &*h.address)).collect();
    assert_eq!(homes, [(0, span(0, 50), "one:1"), (1, span(50, 100), "two:2")]);
    let shares: Vec<_> = plan.shares[&0].values().map(|s| (s.tokens, s.owner, s.tasks.len())).collect();
    assert_eq!(shares, [(span(50, 100), 1, 2)], "its own keys' gradients come to it too");

    let plan = plan_of(0, [7, 7], |_| {}).unwrap();
    assert_eq!(plan.tasks.len(), 1);
    assert_eq!(plan.tasks[0].fetch, None, "it holds all keys of its rows");
    let shares: Vec<_> = plan.shares[&0].values().map(|s| (s.tokens, s.owner, s.tasks.len())).collect();
    assert_eq!(shares, [(span(0, 50), 1, 2)]);
}

#[test]
fn only_a_group_that_one_server_has_is_added_up() {
    let group_tasks = |servers| -> Vec<u32> {
        plan_of(1, servers, |_| {}).unwrap().tasks.iter().map(|task| task.group_tasks).collect()
    };
    assert_eq!(group_tasks([7, 7]), [2, 2]);
    assert_eq!(group_tasks([7, 8]), [0, 0]);
}

#[test]
fn plans_that_leave_rows_or_columns_out_are_refused() {
    let check = |rank: u32, change: fn(&mut Vec<PlannedTask>), words: &str| {
        let error = plan_of(rank, [7, 7], change).unwrap_err();
        assert!(error.contains(words), "{error} does not say {words}");
    };
    check(1, |tasks| tasks.truncate(2), "its tasks hold");
    // Rank 0 computes all of its rows, and would wait for gradients that never come, or miss some.
    check(0, |tasks| tasks.truncate(2), "its tasks hold");
    check(0, |tasks| tasks.push(PlannedTask { group: 2, ..tasks[2] }), "overlap");
    check(1, |tasks| tasks[1].q = span(40, 75), "lie on several ranks");
    check(1, |tasks| tasks[2].position = 0, "not of one kind and number");
}
