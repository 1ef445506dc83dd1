//! What DistCA's authors measured beside what is predicted. The records are in the history of `benchmarks/` in
//! github.com/hao-ai-lab/DistCA: H200s, tensor 8 with sequence parallelism, bf16.

use super::token;
use crate::policy::Policy;
use crate::scenario::Recompute;
use crate::setting::Setting;
use crate::{Gpu, Layout, Memory, Mix, Model, Network, Scenario, SimulationError, Tuning, simulate};

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A run by the words of its script: ping and pong are `batch` sequences each, in each of `micro_batches`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    model: &'static str,
    policy: Policy,
    recompute: Recompute,
    nodes: u32,
    batch: u64,
    micro_batches: u32,
    /// Tokens of a sequence, each of which is one document here, so that all ranks have as many.
    context: u64,
    context_parallel: Option<u32>,
    pipeline: u32,
}

impl Run {
    /// A run without a pipeline.
    fn new(policy: Policy, nodes: u32, batch: u64, context: u64) -> Run {
        Run {
            model: "llama-8b",
            policy,
            recompute: Recompute::Mlp,
            nodes,
            batch,
            micro_batches: 1,
            context,
            context_parallel: None,
            pipeline: 1,
        }
    }

    fn scenario(self) -> Scenario {
        let Run { nodes, batch, micro_batches, context, pipeline, .. } = self;
        let layout =
            Layout { pipeline, context: self.context_parallel, micro_batches, ..Layout::new(8 * nodes, 8) };
        Scenario {
            model: Model::built_in(self.model).expect("a built-in model"),
            gpu: Gpu::built_in("h200").expect("a built-in GPU"),
            network: Network::default(),
            layout,
            context: context as usize,
            tokens: 2 * batch * u64::from(micro_batches) * context,
            mix: Mix::Lengths([context as u32].into()),
            seed: 0,
            steps: 1,
            recompute: self.recompute,
            update: false,
            keep: false,
            nano_batches: 2,
            token_room: 1.0,
            tolerance: 0.05,
            delay: 1,
            token_slack: 0.0,
            tuning: Tuning::default(),
        }
    }

    fn memory(self) -> Result<Memory, SimulationError> {
        simulate(&self.scenario(), self.policy).map(|outcome| outcome.memory)
    }
}

/// Checks that what is predicted is `least` to `most` times what was measured.
fn check(what: &str, predicted: f64, measured: f64, [least, most]: [f64; 2]) {
    let times = predicted / measured;
    assert!(
        (least..=most).contains(&times),
        "{what}: predicted {:.2} GiB, measured {:.2}, {times:.3} times",
        predicted / GIB,
        measured / GIB
    );
}

/// The 8B model on one node, nothing computed again (`_250915_basic_exps`, item 4). Their GB are thousands of MiB.
#[test]
fn parts_are_what_was_measured() {
    let measured = [
        (16 << 10, [12_800.0, 4_096.0, 2_320.0]),
        (32 << 10, [25_600.0, 8_192.0, 4_640.0]),
        (64 << 10, [51_200.0, 16_384.0, 9_280.0]),
    ];
    for (context, [ffn, heads, rest]) in measured {
        let run = Run { recompute: Recompute::None, ..Run::new(Policy::Wlb, 1, 1, context) };
        let scenario = run.scenario();
        let setting = Setting::new(&scenario, scenario.layout).expect("a layout that makes sense");
        let [weights, gradients, optimizer] = setting.model_bytes();
        let (master, moments) = (optimizer / 3.0, optimizer * 2.0 / 3.0);
        // What was allocated before the first step, f32 weights with it. Moments were written down without decimals.
        check("weights", weights + gradients + master, 9_576.0 * MIB, [0.99, 1.01]);
        check("moments", moments, 7_000.0 * MIB, [0.9, 1.1]);
        let token = token::kept(&setting);
        let all = |bytes: f64| bytes * scenario.tokens as f64 * f64::from(scenario.model.layers);
        // A layer's input is what the MLP before it made.
        check("FFN", all(token.mlp + token.input), ffn * MIB, [0.99, 1.01]);
        check("Q, K, V and O", all(token.attention), heads * MIB, [0.99, 1.01]);
        // 256 bytes of a token and layer, as many as an element of one head, are not explained.
        check("the rest", all(token.stream), rest * MIB, [0.85, 1.0]);
        check("activations", all(token.with(Recompute::None)), (ffn + heads + rest) * MIB, [0.97, 1.0]);
    }
}

/// The most that PyTorch had allocated in a step of DistCA, 262,144 tokens a rank (`_250916_memory_constraint`).
#[test]
fn peaks_are_what_was_measured() {
    for (nodes, batch, measured) in [(8, 4, 71.26), (16, 8, 70.03), (32, 16, 70.91)] {
        let run = Run::new(Policy::Distca, nodes, batch, 256 << 10);
        let memory = run.memory().expect("it fitted");
        let scenario = run.scenario();
        // Their steps have no optimizer, so that there are no moments, and no cross-entropy, so that no logits are in f32
        // (nothing else leaves room for what was measured). The transport's buffers are not PyTorch's.
        let moments = memory.optimizer * 2.0 / 3.0;
        let a_rank = scenario.tokens as f64 / f64::from(scenario.layout.ranks());
        let in_f32 = 4.0 * a_rank * f64::from(scenario.model.vocabulary) / f64::from(scenario.layout.tensor);
        let allocated = memory.total() - moments - in_f32 - memory.transport_buffers;
        check(&format!("{nodes} nodes"), allocated, measured * GIB, [0.97, 1.05]);
    }
}

/// Runs of which it is known whether they fitted.
const FITTED: &str = include_str!("fitted.txt");

/// Those that did not fit, and are predicted to. WLB-LLM's packing was called in a way that with several micro-batches gives
/// some of them many more tokens than others, where here all have as many. What DistCA needed more in its runs is not known,
/// but for the two at 512K, which had buffers of four times 4 GiB.
const NOT_PREDICTED: [&str; 11] = [
    "34b wlb 64 16 2 256 2 1 no",
    "34b wlb 64 16 2 256 4 1 no",
    "34b wlb 16 1 8 512 16 1 no",
    "34b wlb 32 1 16 512 32 1 no",
    "34b wlb 16 1 8 512 4 2 no",
    "34b wlb 32 1 16 512 4 4 no",
    "34b distca 64 1 16 384 - 1 no",
    "34b distca 16 1 4 384 - 2 no",
    "34b distca 64 8 1 512 - 1 no",
    "34b distca 64 2 4 512 - 2 no",
    "34b distca 64 1 16 384 - 8 no",
];

/// A line of [`FITTED`]: the run, and whether it fitted.
fn parsed(line: &'static str) -> (Run, bool) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [model, policy, nodes, batch, micro_batches, context, context_parallel, pipeline, fitted] = words[..]
    else {
        panic!("{line}")
    };
    let whole = |word: &str| word.parse::<u32>().unwrap_or_else(|error| panic!("{line}: {error}"));
    let run = Run {
        model: if model == "8b" { "llama-8b" } else { "llama-34b" },
        micro_batches: whole(micro_batches),
        context_parallel: (context_parallel != "-").then(|| whole(context_parallel)),
        pipeline: whole(pipeline),
        ..Run::new(
            policy.parse().expect("a policy"),
            whole(nodes),
            whole(batch).into(),
            u64::from(whole(context)) << 10,
        )
    };
    (run, fitted == "yes")
}

#[test]
fn runs_are_predicted_to_fit_that_fitted() {
    let lines = FITTED.lines().filter(|line| !line.starts_with('#'));
    let is_wrong = |line: &&'static str| {
        let (run, fitted) = parsed(line);
        match run.memory() {
            Ok(_) => !fitted,
            Err(SimulationError::Memory { .. }) => fitted,
            Err(error) => panic!("{line}: {error}"),
        }
    };
    let mut wrong: Vec<&str> = lines.filter(is_wrong).collect();
    let mut known = NOT_PREDICTED;
    wrong.sort_unstable();
    known.sort_unstable();
    assert_eq!(wrong, known);
}
