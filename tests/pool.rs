//! Attention through the pool equals attention at home, whoever computes it, and whoever dies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod cluster;

use std::time::Duration;

use cluster::{Cluster, LayerOutput, RankInputs, documents};
use outboard_attention::{DType, HeadGeometry};
use outboard_attention_server::{EngineOptions, Service};
use outboard_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use outboard_proto::v1::{DrainServerRequest, ListPoolRequest};
use outboard_transport::TaskHandler;
use outboard_worker::{JobOptions, PoolAttention, Rates, StepStats};

const JOB: &str = "test";

fn geometry() -> HeadGeometry {
    HeadGeometry::standard(8, 2, 32).unwrap()
}

/// Documents of two ranks, the first with far more work.
const LENGTHS: [&[usize]; 2] = [&[2048], &[1, 130, 517, 300, 700, 400]];

/// Computes one step of one layer on all ranks at once.
fn step(pools: &[PoolAttention], lengths: &[&[usize]], step: u64) -> Vec<(LayerOutput, StepStats)> {
    step_of(geometry(), pools, lengths, step)
}

fn step_of(
    geometry: HeadGeometry,
    pools: &[PoolAttention],
    lengths: &[&[usize]],
    step: u64,
) -> Vec<(LayerOutput, StepStats)> {
    for (rank, pool) in pools.iter().enumerate() {
        pool.submit_step(step, documents(rank as u32, lengths[rank])).unwrap();
    }
    std::thread::scope(|scope| {
        let computing: Vec<_> = pools
            .iter()
            .enumerate()
            .map(|(rank, pool)| {
                scope.spawn(move || {
                    let inputs = RankInputs::random(step, 0, rank as u32, geometry, lengths[rank]);
                    let output = inputs.compute(pool).unwrap();
                    (output, pool.finish_step(step, 0.1).unwrap())
                })
            })
            .collect();
        computing.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Checks outputs against those computed at home, and returns their bits.
fn check(outputs: &[(LayerOutput, StepStats)], lengths: &[&[usize]], step: u64) -> Vec<Vec<u32>> {
    check_of(geometry(), outputs, lengths, step)
}

fn check_of(
    geometry: HeadGeometry,
    outputs: &[(LayerOutput, StepStats)],
    lengths: &[&[usize]],
    step: u64,
) -> Vec<Vec<u32>> {
    for (rank, (output, _)) in outputs.iter().enumerate() {
        let local = RankInputs::random(step, 0, rank as u32, geometry, lengths[rank]).compute_locally();
        let distance = output.distance(&local);
        assert!(distance < 2e-6, "rank {rank} is {distance:e} from its local attention");
    }
    outputs.iter().map(|(output, _)| output.bits()).collect()
}

fn tasks_computed(services: &[Service]) -> u64 {
    services.iter().map(|s| s.engine().stats()).map(|s| s.forward_tasks + s.backward_tasks).sum()
}

#[test]
fn in_place_servers_balance_two_ranks() {
    let cluster = Cluster::start();
    let services = [cluster.server(Some((JOB, 0))), cluster.server(Some((JOB, 1)))];
    let pools = cluster.join(JOB, 2, geometry(), &[Some(&services[0]), Some(&services[1])]);
    for n in 0..3 {
        let outputs = step(&pools, &LENGTHS, n);
        check(&outputs, &LENGTHS, n);
        let stats = &outputs[0].1;
        assert!(stats.summary.imbalance_before > 1.5 && stats.summary.imbalance_after < 1.05, "{stats:?}");
        assert!(outputs.iter().any(|(_, stats)| stats.bytes_moved > 0));
        let mut planned = [0, 0];
        for placed in outputs.iter().flat_map(|(_, stats)| &stats.placed) {
            planned[placed.rank.unwrap() as usize] += placed.cells;
        }
        let (sum, most) = (planned.iter().sum::<u64>(), planned.into_iter().max().unwrap());
        assert_eq!(sum, stats.summary.cells);
        let after = most as f64 / (sum as f64 / 2.0);
        assert!((after - stats.summary.imbalance_after).abs() < 1e-9, "{planned:?} {stats:?}");
        let own: u64 = outputs.iter().map(|(_, stats)| stats.tasks).sum();
        assert_eq!(own, 2 * stats.summary.tasks, "each task is computed forward and backward");
        assert_eq!(tasks_computed(&services), 2 * stats.summary.tasks * (n + 1));
    }
}

#[test]
fn links_that_are_declared_slow_carry_fewer_bytes_down_to_none() {
    let cluster = Cluster::start();
    let with_rates = |job: &str, rates: Option<Rates>| {
        let services = [cluster.server(Some((job, 0))), cluster.server(Some((job, 1)))];
        let options = JobOptions::new(cluster.url.clone(), job.to_owned(), 0, 2, geometry());
        let pools =
            cluster.join_with(&JobOptions { rates, ..options }, &[Some(&services[0]), Some(&services[1])]);
        let outputs = step(&pools, &LENGTHS, 0);
        check(&outputs, &LENGTHS, 0);
        let summary = &outputs[0].1.summary;
        let moved: u64 = outputs.iter().map(|(_, stats)| stats.bytes_moved).sum();
        (moved, summary.forward_bytes + summary.backward_bytes, summary.imbalance_after)
    };
    let rates = |bytes_per_second| Some(Rates { flops_per_second: 1e9, bytes_per_second });
    let balanced = with_rates("balanced", None);
    let slow = with_rates("slow", rates(3e5));
    let slowest = with_rates("slowest", rates(1.0));
    assert!(balanced.0 > slow.0 && slow.0 > 0, "{balanced:?} {slow:?}");
    assert!(balanced.1 > slow.1 && slow.1 > 0, "{balanced:?} {slow:?}");
    assert_eq!((slowest.0, slowest.1), (0, 0));
    assert!(balanced.2 < slow.2 && slow.2 < slowest.2, "{balanced:?} {slow:?} {slowest:?}");
}

#[test]
fn a_dedicated_pool_gives_the_same_bits_when_a_server_dies() {
    let bits_with = |kill: bool| {
        let cluster = Cluster::start();
        let mut services: Vec<_> = (0..3).map(|_| cluster.server(None)).collect();
        let pools = cluster.join(JOB, 2, geometry(), &[]);
        let mut bits = Vec::new();
        for n in 0..4 {
            if kill && n == 1 {
                // Dropped, not drained: streams are cut and the coordinator is not told.
                drop(services.remove(1));
            }
            let outputs = step(&pools, &LENGTHS, n);
            bits.push(check(&outputs, &LENGTHS, n));
            let resent: u64 = outputs.iter().map(|(_, stats)| stats.tasks_resent).sum();
            assert_eq!(resent > 0, kill && n == 1, "step {n}: {resent} tasks resent");
        }
        bits
    };
    assert_eq!(bits_with(false), bits_with(true));
}

#[test]
fn every_element_type_travels_and_takes_its_own_size() {
    let moved = DType::ALL.map(|dtype| {
        let geometry = geometry().with_dtype(dtype);
        let cluster = Cluster::start();
        // One in place, by pointer for its rank, and one that both ranks reach by their sockets.
        let services = [cluster.server(Some((JOB, 0))), cluster.server(None)];
        let pools = cluster.join(JOB, 2, geometry, &[Some(&services[0]), None]);
        assert!(pools[0].numerics_id().contains(&format!("-{dtype}-")), "{}", pools[0].numerics_id());
        let outputs = step_of(geometry, &pools, &LENGTHS, 0);
        check_of(geometry, &outputs, &LENGTHS, 0);

        // The job has one element type, and so has every call.
        pools[0].submit_step(1, documents(0, &[64])).unwrap();
        pools[1].submit_step(1, documents(1, &[64])).unwrap();
        let other = if dtype == DType::F32 { DType::Bf16 } else { DType::F32 };
        let mut inputs = RankInputs::random(1, 0, 0, geometry, &[64]);
        inputs.qkv.v = RankInputs::random(1, 0, 0, geometry.with_dtype(other), &[64]).qkv.v;
        let error = inputs.compute(&pools[0]).unwrap_err().to_string();
        assert!(error.contains(&format!("v holds {other}; the geometry says {dtype}")), "{error}");
        outputs.iter().map(|(_, stats)| stats.bytes_moved).sum::<u64>()
    });
    // Inputs are half as large, results as large as before.
    let [of_f32, of_bf16, of_f16] = moved;
    assert!(of_bf16 == of_f16 && of_bf16 * 4 < of_f32 * 3 && of_bf16 * 2 > of_f32, "{moved:?}");
}

#[test]
fn a_drained_server_gets_no_more_tasks_and_none_is_resent() {
    let cluster = Cluster::start();
    let mut services: Vec<_> = (0..2).map(|_| cluster.server(None)).collect();
    let pools = cluster.join(JOB, 1, geometry(), &[]);
    let lengths: [&[usize]; 1] = [&[900, 33]];
    check(&step(&pools, &lengths, 0), &lengths, 0);
    let leaving = services.remove(0);
    let engine = leaving.engine();
    cluster.runtime.block_on(leaving.shut_down()).unwrap();
    let before = engine.stats().forward_tasks;
    let outputs = step(&pools, &lengths, 1);
    check(&outputs, &lengths, 1);
    assert_eq!(engine.stats().forward_tasks, before);
    assert_eq!(outputs[0].1.tasks_resent, 0);
}

#[test]
fn no_server_left_is_an_error_that_names_the_task() {
    let cluster = Cluster::start();
    let services = vec![cluster.server(None)];
    let pools = cluster.join(JOB, 1, geometry(), &[]);
    pools[0].submit_step(0, documents(0, &[64])).unwrap();
    pools[0].await_plan(0).unwrap();
    drop(services);
    let inputs = RankInputs::random(0, 0, 0, geometry(), &[64]);
    let error = inputs.compute(&pools[0]).unwrap_err().to_string();
    for part in ["rank 0", "job test", "step 0", "layer 0", "forward", "document 0.0", "no server is left"] {
        assert!(error.contains(part), "{part:?} is missing in: {error}");
    }
}

#[test]
fn a_task_larger_than_every_server_is_refused_with_both_sizes() {
    let cluster = Cluster::start();
    // Enough for the kernel to work in and for short documents.
    let engine = EngineOptions { memory_bytes: 8 << 20, ..EngineOptions::default() };
    let _services = [cluster.server_with(None, engine.clone())];
    let pools = cluster.join(JOB, 1, geometry(), &[]);
    pools[0].submit_step(0, documents(0, &[20_000])).unwrap();
    let inputs = RankInputs::random(0, 0, 0, geometry(), &[20_000]);
    let error = inputs.compute(&pools[0]).unwrap_err().to_string();
    assert!(error.contains("bytes are needed at once") && error.contains("more memory"), "{error}");
    pools[0].finish_step(0, 0.1).unwrap();

    // Other work runs on.
    let lengths: [&[usize]; 1] = [&[16]];
    check(&step(&pools, &lengths, 1), &lengths, 1);
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() {
    let cluster = Cluster::start();
    let _services = [cluster.server(None)];
    let pools = cluster.join(JOB, 1, geometry(), &[]);
    pools[0].submit_step(0, documents(0, &[64])).unwrap();
    let mut inputs = RankInputs::random(0, 3, 0, geometry(), &[64]);
    inputs.qkv.k = vec![0.0_f32; 7].into();
    let error = inputs.compute(&pools[0]).unwrap_err().to_string();
    assert!(error.contains("layer 3") && error.contains("k holds 7 elements"), "{error}");
    let unknown = RankInputs::random(9, 0, 0, geometry(), &[64]).compute(&pools[0]).unwrap_err().to_string();
    assert!(unknown.contains("step 9") && unknown.contains("submitted"), "{unknown}");
}

#[test]
fn a_call_that_differs_from_what_was_submitted_is_refused() {
    let cluster = Cluster::start();
    let _services = [cluster.server(None)];
    let pools = cluster.join(JOB, 1, geometry(), &[]);
    pools[0].submit_step(0, documents(0, &[64, 9])).unwrap();
    let refused = |inputs: RankInputs| inputs.compute(&pools[0]).unwrap_err().to_string();

    let longer = refused(RankInputs::random(0, 0, 0, geometry(), &[65, 9]));
    assert!(longer.contains("document 0.0") && longer.contains("64") && longer.contains("65"), "{longer}");
    let missing = refused(RankInputs::random(0, 0, 0, geometry(), &[64]));
    assert!(missing.contains("document 0.1"), "{missing}");
    let unknown = refused(RankInputs::random(0, 0, 0, geometry(), &[64, 9, 5]));
    assert!(unknown.contains("document 0.2"), "{unknown}");
    let mut other_tick = RankInputs::random(0, 0, 0, geometry(), &[64, 9]);
    other_tick.call.tick = 1;
    assert!(refused(other_tick).contains("tick 1"));
    let heads = refused(RankInputs::random(0, 0, 0, HeadGeometry::standard(8, 4, 32).unwrap(), &[64, 9]));
    assert!(heads.contains("kv_heads: 4") && heads.contains("kv_heads: 2"), "{heads}");

    let again = pools[0].submit_step(0, documents(0, &[64])).unwrap_err().to_string();
    assert!(again.contains("submitted before"), "{again}");
    RankInputs::random(0, 0, 0, geometry(), &[64, 9]).compute(&pools[0]).unwrap();
}

#[test]
fn a_server_that_the_coordinator_drains_ends_by_itself() {
    let cluster = Cluster::start();
    let mut service = cluster.server(None);
    let (url, engine) = (cluster.url.clone(), service.engine());
    cluster.runtime.block_on(async {
        let mut client = CoordinatorServiceClient::connect(url).await.unwrap();
        let pool = client.list_pool(ListPoolRequest {}).await.unwrap().into_inner();
        let server_id = pool.servers[0].server.as_ref().unwrap().id;
        client.drain_server(DrainServerRequest { server_id }).await.unwrap();
        tokio::time::timeout(Duration::from_secs(30), service.ended()).await.unwrap().unwrap();
        service.shut_down().await.unwrap();
    });
    assert!(engine.stats().draining);
}
