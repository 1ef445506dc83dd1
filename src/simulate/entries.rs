//! What a simulation is asked: every entry of the file and every flag, by one list.

use std::sync::LazyLock;

use clap::builder::PossibleValuesParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, FromArgMatches};
use outboard_simulator::{Gpu, Mix, Model, Policy, Recompute, Tuning};

use super::shapes;

/// One thing that can be said.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// As the file names it, with its table.
    pub(super) name: &'static str,
    /// As the command line names it; empty for what only the file has.
    pub(super) flag: &'static str,
    /// What a value is.
    kind: Kind,
    /// What it is where nobody says so, if that is one value.
    pub(super) default: &'static str,
    about: &'static str,
    heading: &'static str,
}

/// How an entry's flag is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A value, called so in the help.
    Value(&'static str),
    /// A flag that means this where it has no value.
    Switch(bool),
}

/// What was said of an entry, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(super) name: String,
    pub(super) text: String,
    /// What an error calls it.
    pub(super) place: String,
}

/// The flags of all entries.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    pub(super) said: Vec<Said>,
}

const JOB: &str = "The job";
const LAYOUT: &str = "Its layout";
const NETWORK: &str = "The network";
const COMPARED: &str = "What is compared";
const TUNING: &str = "Efficiencies and overheads, printed with every result";

const fn entry(
    [name, flag, value, default]: [&'static str; 4],
    heading: &'static str,
    about: &'static str,
) -> Entry {
    Entry { name, flag, kind: Kind::Value(value), default, about, heading }
}

const FIXED: [Entry; 33] = [
    entry(
        ["model", "model", "NAME|FILE.json", "llama-8b"],
        JOB,
        "What is trained: {models}, or a file of shapes: name, layers, hidden, ffn, q_heads, kv_heads, head_dim, vocabulary and dtype",
    ),
    entry(["gpu", "gpu", "NAME", "h200"], JOB, "What it is trained on: {gpus}"),
    entry(
        ["gpu.peak_flops_per_second", "", "", ""],
        JOB,
        "Dense FLOPs a second at best, in place of the GPU's",
    ),
    entry(["gpu.memory_bytes", "", "", ""], JOB, "Its memory, in place of the GPU's"),
    entry(["gpu.memory_bytes_per_second", "", "", ""], JOB, "How fast it reads it, in place of the GPU's"),
    entry(
        ["profile", "profile", "PROFILE.json", ""],
        JOB,
        "How fast the GPU computes core attention: a file that `outboard profile` wrote, in place of what is known of the GPU",
    ),
    entry(
        ["context", "context", "TOKENS", "512k"],
        JOB,
        "Tokens of the longest document; k is 1024, m is 1024 k",
    ),
    entry(
        ["tokens", "tokens", "TOKENS", ""],
        JOB,
        "Tokens of a step [default: 128k for every rank, and a context at least]",
    ),
    entry(
        ["mix", "mix", "NAME|FILE", "prolong"],
        JOB,
        "How long documents are: {mixes}, or a file of lengths, one a line or a JSON array, each as likely as another unless they come in order",
    ),
    Entry {
        name: "in_order",
        flag: "in-order",
        kind: Kind::Switch(true),
        default: "",
        about: "Take the documents of the mix, a file, in its order, and from its start again, instead of drawing them; the context is where sequences are cut, whether one reaches it or not",
        heading: JOB,
    },
    entry(["seed", "seed", "N", "0"], JOB, "Of the documents that are drawn"),
    entry(["steps", "steps", "N", "4"], JOB, "Steps that are simulated; results are their mean"),
    entry(
        ["recompute", "recompute", "NAME", "mlp"],
        JOB,
        "What of a layer's forward pass is done again backward: {recomputes}",
    ),
    Entry {
        name: "update",
        flag: "no-update",
        kind: Kind::Switch(false),
        default: "",
        about: "Leave out what ends a step: the reduction of gradients and the optimizer",
        heading: JOB,
    },
    entry(
        ["layout.gpus", "gpus", "N", "64"],
        LAYOUT,
        "All GPUs, those of dedicated attention servers among them",
    ),
    entry(["layout.tensor", "tensor", "N", "8"], LAYOUT, "Lanes of tensor parallelism"),
    entry(["layout.pipeline", "pipeline", "N", "1"], LAYOUT, "Stages of the pipeline"),
    entry(
        ["layout.context_parallel", "context-parallel", "N", ""],
        LAYOUT,
        "Context parallelism: ranks that share a sequence, for the policies that have a notion of it [default: each chooses the best]",
    ),
    entry(["layout.micro_batches", "micro-batches", "N", "1"], LAYOUT, "Micro-batches of a step"),
    entry(
        ["layout.dedicated", "dedicated", "N", "0"],
        LAYOUT,
        "GPUs that do nothing but core attention; with 0 every rank's own GPUs serve it, in place. Policies without attention servers have these GPUs as ranks",
    ),
    Entry {
        name: "keep",
        flag: "keep",
        kind: Kind::Switch(true),
        default: "",
        about: "Attention servers keep Q, K and V for the backward pass, instead of being sent them again",
        heading: LAYOUT,
    },
    entry(
        ["nano_batches", "nano-batches", "N", "2"],
        LAYOUT,
        "Parts of a micro-batch that take turns where there are attention servers: 2 (ping and pong), or 1",
    ),
    entry(
        ["tolerance", "tolerance", "FRACTION", "0.05"],
        LAYOUT,
        "Where DistCA's planner stops: a server that lacks no more than this fraction of its share gets no more",
    ),
    entry(
        ["token_room", "token-room", "X", "1.2"],
        LAYOUT,
        "The most tokens of a micro-batch of variable length over the mean (wlb)",
    ),
    entry(
        ["delay", "delay", "N", "4"],
        LAYOUT,
        "The most steps whose documents may change places in variable-length packing (wlb); 1 puts none off",
    ),
    entry(
        ["token_slack", "token-slack", "FRACTION", "0.02"],
        LAYOUT,
        "How far above the mean the tokens of a rank may lie where the planner chooses homes, as a fraction of it",
    ),
    entry(["network.gpus_per_node", "gpus-per-node", "N", "8"], NETWORK, "GPUs of a node"),
    entry(
        ["network.within.bytes_per_second", "link-within", "RATE", "450GB/s"],
        NETWORK,
        "Each GPU's link to those of its node, each way: bytes a second, or as 450GB/s",
    ),
    entry(
        ["network.between.bytes_per_second", "link-between", "RATE", "50GB/s"],
        NETWORK,
        "Each GPU's link to those of other nodes, each way: bytes a second, or as 50GB/s or 400Gb/s",
    ),
    entry(
        ["network.within.latency_seconds", "latency-within", "SECONDS", "5us"],
        NETWORK,
        "What a transfer within a node takes besides its bytes, as 5e-6 or 5us",
    ),
    entry(
        ["network.between.latency_seconds", "latency-between", "SECONDS", "15us"],
        NETWORK,
        "The same between nodes",
    ),
    entry(
        ["policy", "policy", "NAME[,NAME...]", ""],
        COMPARED,
        "Ways to share attention that are compared: {policies} [default: all]",
    ),
    entry(
        ["sweep", "sweep", "NAME=X[,X...] ...", ""],
        COMPARED,
        "Simulate every combination of these values, as in \"gpus=64,128,256 context=128k,512k\"; names are those of flags with a value",
    ),
];

/// Every entry: those above, and the parameters of the simulator.
pub(super) static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    // Once a process, since the command line wants names that stay.
    let kept = |text: String| -> &'static str { text.leak() };
    let tuning = Tuning::default().entries().map(|(name, value, unit)| Entry {
        name: kept(format!("tuning.{name}")),
        flag: kept(name.replace('_', "-")),
        kind: Kind::Value("X"),
        default: kept(value.to_string()),
        about: kept(format!("{}, {unit}", name.replace('_', " "))),
        heading: TUNING,
    });
    FIXED.into_iter().chain(tuning).collect()
});

impl Entry {
    /// The one of that name, or else of that flag.
    pub(super) fn named(name: &str) -> Option<&'static Entry> {
        let by = |of: fn(&Entry) -> &'static str| ENTRIES.iter().find(|entry| of(entry) == name);
        by(|entry| entry.name).or_else(|| by(|entry| entry.flag).filter(|entry| entry.takes_value()))
    }

    /// The one in a table that goes by this name there, or whose flag does.
    pub(super) fn in_a_table(name: &str) -> Option<String> {
        let named = ENTRIES.iter().map(|entry| (entry, entry.name.rsplit_once('.')));
        let mut of_tables = named.filter_map(|(entry, split)| Some((entry, split?.1)));
        let entry = of_tables.find(|(entry, last)| *last == name || entry.flag.replace('-', "_") == name);
        let of_model = || shapes::KEYS.contains(&name).then(|| format!("model.{name}"));
        entry.map(|(entry, _)| entry.name.to_owned()).or_else(of_model)
    }

    /// What people call it.
    pub(super) fn called(&self) -> &'static str {
        if self.flag.is_empty() || !self.takes_value() { self.name } else { self.flag }
    }

    fn takes_value(&self) -> bool {
        !self.flag.is_empty() && matches!(self.kind, Kind::Value(_))
    }

    fn arg(&self) -> Arg {
        let about = self
            .about
            .replace("{models}", &Model::BUILT_IN.join(", "))
            .replace("{gpus}", &Gpu::BUILT_IN.join(", "))
            .replace("{mixes}", &Mix::BUILT_IN.join(", "))
            .replace("{recomputes}", &Recompute::NAMES.join(", "))
            .replace("{policies}", &Policy::NAMES.join(", "));
        let help = match self.default {
            "" => about,
            default => format!("{about} [default: {default}]"),
        };
        let arg = Arg::new(self.name).long(self.flag).help(help).help_heading(self.heading);
        match self.kind {
            Kind::Value(name) => arg.value_name(name).allow_negative_numbers(true),
            Kind::Switch(_) => arg
                .value_name("BOOL")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .hide_possible_values(true)
                .value_parser(PossibleValuesParser::new(["true", "false"])),
        }
    }

    /// What the flag's value says of the entry.
    fn meant(&self, text: &str) -> String {
        match self.kind {
            Kind::Switch(without) => ((text == "true") == without).to_string(),
            Kind::Value(_) => text.to_owned(),
        }
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        let flags = ENTRIES.iter().filter(|entry| !entry.flag.is_empty());
        flags.fold(command, |command, entry| command.arg(entry.arg()))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Flags::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Flags, clap::Error> {
        let mut flags = Flags::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for entry in ENTRIES.iter().filter(|entry| !entry.flag.is_empty()) {
            if matches.value_source(entry.name) != Some(ValueSource::CommandLine) {
                continue;
            }
            if let Some(text) = matches.get_one::<String>(entry.name) {
                let (name, place) = (entry.name.to_owned(), format!("--{}", entry.flag));
                self.said.push(Said { name, text: entry.meant(text), place });
            }
        }
        Ok(())
    }
}
