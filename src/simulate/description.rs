//! What is to be simulated, as it was said.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use outboard_planner::Profile;
use outboard_simulator::{
    Gpu, Layout, Mix, Model, Network, Policy, Recompute, Scenario, SimulationError, Tuning,
};

use super::entries::{ENTRIES, Entry, Said};
use super::sweep::{self, Axis};
use super::value::{number, rate, seconds, small, truth, whole};
use super::{lengths, shapes};

/// Tokens of every rank in a micro-batch, where nobody says how many there are.
const TOKENS_A_RANK: u64 = 128 << 10;

/// A scenario that is being put together.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    scenario: Scenario,
    /// As many as there are by default, where there is none.
    tokens: Option<u64>,
    /// In place of the GPU's.
    profile: Option<Profile>,
    /// What the mix is called.
    mix: String,
    /// Whether its documents are those of a file in their order.
    in_order: bool,
    pub(super) policies: Vec<Policy>,
    pub(super) sweep: Vec<Axis>,
    /// From where files that the sweep names are looked for.
    folder: PathBuf,
}

/// A scenario with the name of its mix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Named {
    pub(crate) scenario: Scenario,
    pub(crate) mix: String,
}

impl Description {
    /// What is simulated where nothing is said.
    pub(crate) fn new() -> anyhow::Result<Description> {
        let model = Model::built_in("llama-8b").context("there is no llama-8b")?;
        let gpu = Gpu::built_in("h200").context("there is no h200")?;
        let scenario = Scenario {
            model,
            gpu,
            network: Network::default(),
            layout: Layout::new(64, 8),
            context: 512 << 10,
            tokens: 0,
            mix: Mix::Prolong,
            seed: 0,
            steps: 4,
            recompute: Recompute::Mlp,
            update: true,
            keep: false,
            nano_batches: 2,
            tolerance: 0.05,
            token_room: 1.2,
            delay: 4,
            token_slack: 0.02,
            tuning: Tuning::default(),
        };
        let mix = scenario.mix.name().to_owned();
        let policies = Policy::ALL.to_vec();
        let (sweep, folder) = (Vec::new(), PathBuf::new());
        let (tokens, profile, in_order) = (None, None, false);
        Ok(Description { scenario, tokens, profile, mix, in_order, policies, sweep, folder })
    }

    /// Takes over what was said, in the order of the entries, so that what refines something comes after it. Files are
    /// looked for from `folder` on.
    pub(crate) fn take(&mut self, said: &[Said], folder: &Path) -> anyhow::Result<()> {
        let names: Vec<&str> = ENTRIES.iter().map(|entry| entry.name).collect();
        for Said { name, place, .. } in said {
            if !names.contains(&name.as_str()) && !name.starts_with("model.") {
                let mut error = SimulationError::unknown("entry", name, &names);
                if let (Some(meant), SimulationError::Unknown { near, .. }) =
                    (Entry::in_a_table(name), &mut error)
                {
                    *near = Some(meant);
                }
                return Err(anyhow::Error::from(error).context(place.clone()));
            }
        }
        let shapes: Vec<&Said> = said.iter().filter(|said| said.name.starts_with("model.")).collect();
        if let Some(first) = shapes.first() {
            self.scenario.model = shapes::of_entries(&shapes).with_context(|| first.place.clone())?;
        }
        for name in names {
            for said in said.iter().filter(|said| said.name == name) {
                self.set(name, &said.text, folder).with_context(|| said.place.clone())?;
            }
        }
        Ok(())
    }

    /// Sets one entry.
    pub(super) fn set(&mut self, name: &str, text: &str, folder: &Path) -> anyhow::Result<()> {
        let Scenario { model, gpu, network, layout, tuning, .. } = &mut self.scenario;
        match name {
            "model" => *model = named_model(text, folder)?,
            "gpu" => {
                *gpu = Gpu::built_in(text)
                    .ok_or_else(|| SimulationError::unknown("gpu", text, &Gpu::BUILT_IN))?;
            }
            "gpu.peak_flops_per_second" => gpu.peak_flops_per_second = number(text)?,
            "gpu.memory_bytes" => gpu.memory_bytes = number(text)?,
            "gpu.memory_bytes_per_second" => gpu.memory_bytes_per_second = rate(text)?,
            "profile" => self.profile = Some(crate::profile::read(&folder.join(text))?),
            "context" => self.scenario.context = usize::try_from(whole(text)?)?,
            "tokens" => self.tokens = Some(whole(text)?),
            "mix" => (self.scenario.mix, self.mix) = named_mix(text, folder)?,
            "in_order" => self.in_order = truth(text)?,
            "seed" => self.scenario.seed = whole(text)?,
            "steps" => self.scenario.steps = small(text)?,
            "recompute" => {
                let unknown = || SimulationError::unknown("choice to recompute", text, &Recompute::NAMES);
                self.scenario.recompute = Recompute::named(text).ok_or_else(unknown)?;
            }
            "update" => self.scenario.update = truth(text)?,
            "keep" => self.scenario.keep = truth(text)?,
            "nano_batches" => self.scenario.nano_batches = small(text)?,
            "tolerance" => self.scenario.tolerance = number(text)?,
            "token_room" => self.scenario.token_room = number(text)?,
            "delay" => self.scenario.delay = small(text)?,
            "token_slack" => self.scenario.token_slack = number(text)?,
            "layout.gpus" => layout.gpus = small(text)?,
            "layout.tensor" => layout.tensor = small(text)?,
            "layout.pipeline" => layout.pipeline = small(text)?,
            "layout.context_parallel" => layout.context = Some(small(text)?),
            "layout.micro_batches" => layout.micro_batches = small(text)?,
            "layout.dedicated" => layout.dedicated = small(text)?,
            "network.gpus_per_node" => network.gpus_per_node = small(text)?,
            "network.within.bytes_per_second" => network.within.bytes_per_second = rate(text)?,
            "network.between.bytes_per_second" => network.between.bytes_per_second = rate(text)?,
            "network.within.latency_seconds" => network.within.latency_seconds = seconds(text)?,
            "network.between.latency_seconds" => network.between.latency_seconds = seconds(text)?,
            "policy" => self.policies = policies(text)?,
            "sweep" => (self.sweep, self.folder) = (sweep::axes(text)?, folder.to_owned()),
            _ => match name.strip_prefix("tuning.") {
                Some(parameter) => tuning.set(parameter, seconds(text)?)?,
                None => bail!("nothing is called {name}"),
            },
        }
        Ok(())
    }

    /// Sets the entries of one point of a sweep.
    pub(super) fn at(&self, point: &[(&'static Entry, &str)]) -> anyhow::Result<Description> {
        let mut description = self.clone();
        for (entry, text) in point {
            description
                .set(entry.name, text, &self.folder)
                .with_context(|| format!("{}={text}", entry.called()))?;
        }
        Ok(description)
    }

    /// What is said, with what nobody said.
    pub(crate) fn named(&self) -> anyhow::Result<Named> {
        let mut scenario = self.scenario.clone();
        if let Some(profile) = &self.profile {
            scenario.gpu.profile = profile.clone();
        }
        let shares = u64::from(scenario.layout.ranks()) * u64::from(scenario.layout.micro_batches);
        scenario.tokens = self.tokens.unwrap_or((TOKENS_A_RANK * shares).max(scenario.context as u64));
        let mut mix = self.mix.clone();
        if self.in_order {
            let Mix::Lengths(lengths) = &scenario.mix else {
                bail!("in_order: documents of the mix {mix} are drawn; name a file of lengths as the mix");
            };
            mix.push_str(" in order");
            scenario.mix = Mix::InOrder(lengths.clone());
        }
        Ok(Named { scenario, mix })
    }
}

impl Named {
    /// The same as `policy` takes it: one without attention servers has all GPUs as ranks.
    pub(crate) fn of_policy(&self, policy: Policy) -> Scenario {
        let mut scenario = self.scenario.clone();
        if !policy.disaggregates() {
            scenario.layout.dedicated = 0;
        }
        scenario
    }
}

fn named_model(text: &str, folder: &Path) -> anyhow::Result<Model> {
    if let Some(model) = Model::built_in(text) {
        return Ok(model);
    }
    let file = folder.join(text);
    if file.is_file() {
        return shapes::read(&file);
    }
    let unknown = SimulationError::unknown("model", text, &Model::BUILT_IN);
    Err(anyhow!("{unknown}; nor is there a file of that name"))
}

fn named_mix(text: &str, folder: &Path) -> anyhow::Result<(Mix, String)> {
    if let Some(mix) = Mix::built_in(text) {
        return Ok((mix, text.to_owned()));
    }
    let file = folder.join(text);
    if file.is_file() {
        let name = file.file_name().map_or_else(|| text.into(), |name| name.to_string_lossy());
        return Ok((Mix::Lengths(Arc::from(lengths::read(&file)?)), name.into_owned()));
    }
    let unknown = SimulationError::unknown("mix", text, &Mix::BUILT_IN);
    Err(anyhow!("{unknown}; nor is there a file of that name"))
}

/// Policies by their names, each once.
fn policies(text: &str) -> anyhow::Result<Vec<Policy>> {
    let mut policies = Vec::new();
    for name in text.split(',').map(str::trim) {
        let policy = name.parse()?;
        if policies.contains(&policy) {
            bail!("{policy} is named twice");
        }
        policies.push(policy);
    }
    Ok(policies)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(name: &str, text: &str) -> Said {
        Said { name: name.to_owned(), text: text.to_owned(), place: format!("--{name}") }
    }

    fn with(entries: &[(&str, &str)]) -> anyhow::Result<Description> {
        let mut description = Description::new()?;
        let said: Vec<Said> = entries.iter().map(|(name, text)| said(name, text)).collect();
        description.take(&said, Path::new(""))?;
        Ok(description)
    }

    #[test]
    fn defaults_are_those_that_help_names() {
        let before = Description::new().unwrap();
        for entry in ENTRIES.iter().filter(|entry| !entry.default.is_empty()) {
            let after = with(&[(entry.name, entry.default)]).unwrap();
            assert_eq!(after.named().unwrap(), before.named().unwrap(), "{}", entry.name);
        }
        before.named().unwrap().scenario.check().unwrap();
    }

    #[test]
    fn every_entry_can_be_said() {
        let values = [
            ("gpu.peak_flops_per_second", "1e15"),
            ("gpu.memory_bytes", "100e9"),
            ("gpu.memory_bytes_per_second", "4TB/s"),
            ("tokens", "2m"),
            ("layout.context_parallel", "2"),
            ("update", "false"),
            ("keep", "true"),
            ("in_order", "false"),
            ("policy", "wlb,outboard"),
            ("sweep", "gpus=8,16"),
        ];
        for entry in ENTRIES.iter().filter(|entry| entry.name != "profile") {
            let value = values.iter().find(|(name, _)| *name == entry.name);
            let text = value.map_or(entry.default, |(_, text)| *text);
            with(&[(entry.name, text)]).unwrap();
        }
    }

    #[test]
    fn what_refines_a_gpu_comes_after_it_whatever_the_order() {
        let description = with(&[("gpu.memory_bytes", "1e11"), ("gpu", "h100")]).unwrap();
        let scenario = description.named().unwrap().scenario;
        assert_eq!((scenario.gpu.name.as_str(), scenario.gpu.memory_bytes), ("h100", 1e11));
    }

    #[test]
    fn tokens_follow_the_ranks() {
        let tokens = |entries: &[(&str, &str)]| with(entries).unwrap().named().unwrap().scenario.tokens;
        assert_eq!(tokens(&[]), 8 * 128 * 1024);
        assert_eq!(tokens(&[("layout.gpus", "256"), ("context", "1m")]), 32 * 128 * 1024);
        assert_eq!(tokens(&[("layout.gpus", "8")]), 512 * 1024, "a context at least");
        assert_eq!(tokens(&[("tokens", "4m")]), 4 << 20);
    }

    #[test]
    fn documents_of_a_file_may_come_in_order() {
        let mut description = with(&[("in_order", "true"), ("context", "900")]).unwrap();
        let refused = |description: &Description| format!("{:#}", description.named().unwrap_err());
        assert!(refused(&description).contains("the mix prolong are drawn"), "{}", refused(&description));
        (description.scenario.mix, description.mix) = (Mix::Lengths([5, 900, 70].into()), "a.txt".to_owned());
        let named = description.named().unwrap();
        assert_eq!(
            (named.mix.as_str(), named.scenario.mix),
            ("a.txt in order", Mix::InOrder([5, 900, 70].into()))
        );
    }

    #[test]
    fn policies_without_servers_have_all_gpus() {
        let named = with(&[("layout.dedicated", "8")]).unwrap().named().unwrap();
        assert_eq!(named.of_policy(Policy::Outboard).layout.ranks(), 7);
        assert_eq!(named.of_policy(Policy::Wlb).layout.ranks(), 8);
        assert_eq!(named.of_policy(Policy::Wlb).tokens, named.of_policy(Policy::Outboard).tokens);
    }

    #[test]
    fn errors_name_the_entry_and_the_nearest_known_name() {
        let cases = [
            ("model", "llama-9b", "--model: no model is called `llama-9b`"),
            ("gpu", "h20", "did you mean `h200`?"),
            ("mix", "prelong", "did you mean `prolong`?"),
            ("policy", "outbord", "did you mean `outboard`?"),
            ("policy", "wlb,wlb", "wlb is named twice"),
            ("recompute", "some", "--recompute: no choice to recompute is called `some`"),
            ("layout.tensr", "8", "did you mean `layout.tensor`?"),
            ("layout.context", "8", "did you mean `layout.context_parallel`?"),
            ("gpus", "8", "did you mean `layout.gpus`?"),
            ("tensor", "8", "did you mean `layout.tensor`?"),
            ("context_parallel", "8", "did you mean `layout.context_parallel`?"),
            ("gpus_per_node", "8", "did you mean `network.gpus_per_node`?"),
            ("link_between", "1", "did you mean `network.between.bytes_per_second`?"),
            ("matmul_efficiency", "1", "did you mean `tuning.matmul_efficiency`?"),
            ("tolerence", "1", "did you mean `tolerance`?"),
            ("tuning.matmul", "1", "no entry is called `tuning.matmul`"),
            ("layout.gpus", "many", "--layout.gpus: `many` is no whole number"),
            ("profile", "no-such-file", "cannot read no-such-file"),
        ];
        for (name, text, says) in cases {
            let error = format!("{:#}", with(&[(name, text)]).unwrap_err());
            assert!(error.contains(says), "{name}: {error}");
        }
    }
}
