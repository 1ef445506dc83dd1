//! Random small jobs.

use outboard_attention::DType;
use outboard_simulator::{Gpu, Layout, Link, Mix, Model, Network, Policy, Recompute, Scenario, Tuning};
use proptest::prelude::*;

pub(crate) fn any_policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(Policy::ALL.to_vec())
}

/// Jobs that make sense, on clusters that need not: some have hardly any memory, or links a thousand times too slow.
pub(crate) fn any_scenario() -> impl Strategy<Value = Scenario> {
    (any_model(), any_layout(), any_gpu(), any_network(), any_tuning(), any_work()).prop_map(
        |(mut model, layout, gpu, network, tuning, work)| {
            // Heads and layers that divide.
            model.kv_heads *= layout.tensor;
            model.q_heads *= model.kv_heads;
            model.layers *= layout.pipeline;
            let Work {
                context,
                sequences,
                rest,
                mix,
                seed,
                steps,
                recompute,
                update,
                keep,
                token_slack,
                nano_batches,
                delay,
            } = work;
            let least = 2 * layout.ranks() as usize * layout.micro_batches as usize;
            let tokens = (context * sequences + rest % context).max(least) as u64;
            let mix = match mix {
                Some(mix) => mix,
                None => Mix::Lengths([1, 7, 100, context as u32].into()),
            };
            Scenario {
                model,
                gpu,
                network,
                layout,
                context,
                tokens,
                mix,
                seed,
                steps,
                recompute,
                update,
                keep,
                token_slack,
                nano_batches,
                token_room: 1.2,
                tolerance: 0.05,
                delay,
                tuning,
            }
        },
    )
}

#[derive(Clone, Debug)]
struct Work {
    context: usize,
    sequences: usize,
    rest: usize,
    mix: Option<Mix>,
    seed: u64,
    steps: u32,
    recompute: Recompute,
    update: bool,
    keep: bool,
    token_slack: f64,
    nano_batches: u32,
    delay: u32,
}

fn any_work() -> impl Strategy<Value = Work> {
    let recompute = prop::sample::select(vec![Recompute::None, Recompute::Mlp, Recompute::Full]);
    let mix = prop::sample::select(vec![
        Some(Mix::Pretrain),
        Some(Mix::Prolong),
        Some(Mix::InOrder([900, 1, 20_000].into())),
        None,
    ]);
    let context = prop_oneof![100usize..5000, Just(1), Just(2), Just(1 << 17)];
    let flags = (any::<bool>(), any::<bool>(), 0.0..0.5, 1u32..3, 1u32..4);
    (context, 1usize..12, any::<u16>(), mix, any::<u64>(), 1u32..4, recompute, flags).prop_map(
        |(
            context,
            sequences,
            rest,
            mix,
            seed,
            steps,
            recompute,
            (update, keep, token_slack, nano_batches, delay),
        )| {
            // The longest documents are as long as the context, which is among the lengths where these are given.
            let context = if mix.is_none() { context.max(100) } else { context };
            let rest = usize::from(rest);
            Work {
                context,
                sequences,
                rest,
                mix,
                seed,
                steps,
                recompute,
                update,
                keep,
                token_slack,
                nano_batches,
                delay,
            }
        },
    )
}

/// A model whose heads are still to be multiplied: `q_heads` a kv head, `kv_heads` a lane, `layers` a stage.
fn any_model() -> impl Strategy<Value = Model> {
    let heads =
        (prop::sample::select(vec![1u32, 2, 3, 4, 8]), 1u32..5, prop::sample::select(vec![64u32, 96, 128]));
    let dtype = prop::sample::select(vec![DType::Bf16, DType::F16]);
    (heads, 1u32..4, 64u32..4096, 64u32..8192, 100u32..100_000, dtype).prop_map(
        |((q_heads, kv_heads, head_dim), layers, hidden, ffn, vocabulary, dtype)| Model {
            name: "random".to_owned(),
            layers,
            hidden,
            ffn,
            q_heads,
            kv_heads,
            head_dim,
            vocabulary,
            dtype,
        },
    )
}

fn any_layout() -> impl Strategy<Value = Layout> {
    let pipeline = prop_oneof![3 => Just(1u32), 1 => Just(2), 1 => Just(4)];
    let dedicated = prop_oneof![3 => Just(0u32), 1 => 1u32..4];
    let tensor = prop::sample::select(vec![1u32, 2, 4]);
    (tensor, pipeline, 1u32..9, any::<prop::sample::Index>(), dedicated, 1u32..5).prop_map(
        |(tensor, pipeline, ranks, context, dedicated, micro_batches)| {
            let divisors: Vec<u32> = (1..=ranks).filter(|context| ranks.is_multiple_of(*context)).collect();
            let dedicated = dedicated * tensor;
            let gpus = tensor * pipeline * ranks + dedicated;
            // `None` as often as any.
            let context = Some(*context.get(&divisors)).filter(|context| *context > 1);
            Layout { gpus, tensor, pipeline, context, dedicated, micro_batches }
        },
    )
}

fn any_gpu() -> impl Strategy<Value = Gpu> {
    let memory = prop_oneof![3 => Just(1.0), 1 => 1e-3..1.0];
    (prop::sample::select(Gpu::BUILT_IN.to_vec()), memory).prop_map(|(name, memory)| {
        let gpu = Gpu::built_in(name).expect("a known name");
        Gpu { memory_bytes: gpu.memory_bytes * memory, ..gpu }
    })
}

fn any_network() -> impl Strategy<Value = Network> {
    let link = || {
        let (power, latency) = (6.0..12.5f64, prop_oneof![Just(0.0), 1e-7..1e-3]);
        (power, latency).prop_map(|(power, latency_seconds)| Link {
            bytes_per_second: 10f64.powf(power),
            latency_seconds,
        })
    };
    (1u32..10, link(), link()).prop_map(|(gpus_per_node, within, between)| Network {
        gpus_per_node,
        within,
        between,
    })
}

fn any_tuning() -> impl Strategy<Value = Tuning> {
    (0.2..1.0, 0.2..1.0, 0.2..1.0, 0.2..1.0, 0.0..1e-3).prop_map(
        |(matmul_efficiency, attention_efficiency, link_efficiency, gather_efficiency, dispatch_seconds)| {
            Tuning {
                matmul_efficiency,
                attention_efficiency,
                link_efficiency,
                gather_efficiency,
                dispatch_seconds,
            }
        },
    )
}
