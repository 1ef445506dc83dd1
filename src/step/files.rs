//! STEP.json and PLAN.json, and what they mean in the domain.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail, ensure};
use outboard_attention::{
    DType, Document, DocumentId, HeadGeometry, HeadShape, HomeRange, InvalidAttention, Span, StepPlan,
};
use outboard_planner::{MIN_LINK, Problem, Rates, Slot};
use serde::{Deserialize, Serialize};

use crate::slices::{self, SliceEntry, span};

/// STEP.json: what one training step asks of core attention.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StepFile {
    model: ModelEntry,
    servers: Vec<ServerEntry>,
    documents: Vec<DocumentEntry>,
    flops_per_second: Option<f64>,
    bytes_per_second: Option<f64>,
    kept: Option<u64>,
    token_slack: Option<f64>,
    slots: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    v_head_dim: Option<usize>,
    bytes_per_element: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerEntry {
    id: u64,
    rank: Option<u32>,
    speed: Option<f64>,
    memory_bytes: Option<u64>,
    bytes_per_second: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DocumentEntry {
    id: u64,
    tokens: usize,
    home: Option<Vec<HomeEntry>>,
    #[serde(default)]
    tick: u32,
    mask: Option<Vec<SliceEntry>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct HomeEntry {
    rank: u32,
    start: usize,
    end: usize,
}

/// A step as the planner takes it.
pub(crate) struct Step {
    /// Slot n is server `servers[n]`, document `0.n` is `documents[n]`.
    pub(crate) problem: Problem,
    /// Servers' ids, ascending.
    pub(crate) servers: Vec<u64>,
    /// Documents' ids, ascending.
    pub(crate) documents: Vec<u64>,
    /// What a server of speed 1 computes in a second, where the step says so.
    pub(crate) flops_per_second: Option<f64>,
    /// Bytes a second of a link of 1, where the step or one of its servers says so.
    pub(crate) link: Option<f64>,
    /// How far a rank may lie above the mean number of tokens, as a fraction of it: where documents come without homes.
    pub(crate) token_slack: Option<f64>,
    /// What the step says and this version does not use.
    pub(crate) unused: Vec<String>,
}

impl TryFrom<StepFile> for Step {
    type Error = anyhow::Error;

    fn try_from(mut file: StepFile) -> anyhow::Result<Step> {
        let geometry = geometry(&file.model).context("model")?;
        let unused = unused(&file)?;
        ensure!(!file.servers.is_empty(), "servers is empty; a plan needs at least one");
        ensure!(!file.documents.is_empty(), "documents is empty; there is nothing to plan");
        if let Some(slots) = file.slots {
            let servers = file.servers.len();
            ensure!(
                slots == servers as u64,
                "slots is {slots}; this version plans one a server, and there are {servers}"
            );
        }
        // Links are relative to what the step says of all, or else to the fastest of them.
        let own = file.servers.iter().filter_map(|server| server.bytes_per_second);
        let link = file.bytes_per_second.or(own.reduce(f64::max));
        let slots = file.servers.iter().enumerate().map(|(n, server)| slot(n, server, link.unwrap_or(1.0)));
        let slots = slots.collect::<anyhow::Result<Vec<_>>>()?;
        let mut servers: Vec<(u64, Slot)> = file.servers.iter().map(|server| server.id).zip(slots).collect();
        servers.sort_unstable_by_key(|(id, _)| *id);
        if let Some(pair) = servers.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            bail!("servers holds id {} twice", pair[0].0);
        }
        let mut of_rank = BTreeMap::new();
        for (id, slot) in &servers {
            if let Some(rank) = slot.rank
                && let Some(other) = of_rank.insert(rank, id)
            {
                bail!("servers {other} and {id} both have rank {rank}; a rank has one in-place server");
            }
        }
        file.documents.iter().enumerate().try_for_each(|document| check_home(document, file.token_slack))?;
        file.documents.sort_by_key(|document| document.id);
        if let Some(pair) = file.documents.windows(2).find(|pair| pair[0].id == pair[1].id) {
            bail!("documents holds id {} twice", pair[0].id);
        }
        let some_free = file.documents.iter().any(|document| document.home.is_none());
        let ids = file.documents.iter().map(|document| document.id).collect();
        let domain = |(n, entry): (usize, DocumentEntry)| {
            let name = format!("document {}", entry.id);
            document(n, entry, &geometry).context(name)
        };
        let documents =
            file.documents.into_iter().enumerate().map(domain).collect::<anyhow::Result<Vec<_>>>()?;
        let (servers, slots) = servers.into_iter().unzip();
        // Where links are not known, only balance and bytes can count.
        let rates = file.bytes_per_second.map(|bytes_per_second| {
            let flops_per_second = file.flops_per_second.unwrap_or(Rates::default().flops_per_second);
            Rates { flops_per_second, bytes_per_second }
        });
        Ok(Step {
            problem: Problem {
                rates,
                kept: file.kept.unwrap_or(1),
                ..Problem::new(geometry, documents, slots)
            },
            servers,
            documents: ids,
            flops_per_second: file.flops_per_second,
            link,
            token_slack: file.token_slack.filter(|_| some_free),
            unused,
        })
    }
}

fn geometry(model: &ModelEntry) -> anyhow::Result<HeadGeometry> {
    let &ModelEntry { q_heads, kv_heads, head_dim, v_head_dim, bytes_per_element } = model;
    let dtype = match bytes_per_element {
        2 => DType::Bf16,
        4 => DType::F32,
        other => bail!("bytes_per_element is {other}; it must be 2 or 4"),
    };
    let scale = 1.0 / (head_dim.max(1) as f32).sqrt();
    let v_head_dim = v_head_dim.unwrap_or(head_dim);
    Ok(HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap: None }.try_into()?)
}

/// What the planner makes no use of yet, said so that nobody counts on it.
fn unused(file: &StepFile) -> anyhow::Result<Vec<String>> {
    let positive = |name: &str, value: Option<f64>| match value {
        Some(value) if !(value.is_finite() && value > 0.0) => {
            bail!("{name} is {value}; it must be finite and above zero")
        }
        value => Ok(value.is_some()),
    };
    let mut unused = Vec::new();
    let rates = [("flops_per_second", file.flops_per_second), ("bytes_per_second", file.bytes_per_second)];
    for (name, value) in rates {
        positive(name, value)?;
    }
    if file.flops_per_second.is_some() && file.bytes_per_second.is_none() {
        unused.push("flops_per_second makes no difference to the plan without bytes_per_second".to_owned());
    }
    if let Some(slack) = file.token_slack {
        ensure!((0.0..=1.0).contains(&slack), "token_slack is {slack}; it must be between 0 and 1");
    }
    if file.token_slack.is_some() && file.documents.iter().all(|document| document.home.is_some()) {
        unused.push("token_slack makes no difference: every document has its home".to_owned());
    }
    for (n, server) in file.servers.iter().enumerate() {
        positive(&format!("servers[{n}].bytes_per_second"), server.bytes_per_second)?;
    }
    Ok(unused)
}

/// The slot of a server. Servers that say nothing of their link have one of `usual` bytes a second.
fn slot(n: usize, server: &ServerEntry, usual: f64) -> anyhow::Result<Slot> {
    let weight = server.speed.unwrap_or(1.0);
    ensure!(
        weight.is_finite() && weight > 0.0,
        "servers[{n}].speed of server {} is {weight}; it must be finite and above zero",
        server.id
    );
    let link = server.bytes_per_second.map_or(1.0, |bytes_per_second| bytes_per_second / usual);
    ensure!(
        (MIN_LINK..=1.0 / MIN_LINK).contains(&link),
        "servers[{n}].bytes_per_second of server {} is {link:e} times that of the others; it must be within {MIN_LINK:e} and {:e}",
        server.id,
        1.0 / MIN_LINK
    );
    Ok(Slot { rank: server.rank, weight, link, memory: server.memory_bytes })
}

fn check_home((n, document): (usize, &DocumentEntry), token_slack: Option<f64>) -> anyhow::Result<()> {
    let id = document.id;
    ensure!(
        document.home.is_some() || token_slack.is_some(),
        "documents[{n}] (id {id}) has no home: add it, or add token_slack to the step to have homes chosen"
    );
    Ok(())
}

fn document(n: usize, entry: DocumentEntry, geometry: &HeadGeometry) -> anyhow::Result<Document> {
    let index = u32::try_from(n).context("more documents than 32 bits can number")?;
    let id = DocumentId { rank: 0, index };
    let range = |home: &HomeEntry| {
        let tokens = span("home", [home.start, home.end])?;
        anyhow::Ok(HomeRange { rank: home.rank, tokens })
    };
    let document = match entry.home {
        None => Document::unplaced(id, entry.tokens)?,
        Some(mut homes) => {
            homes.sort_by_key(|home| home.start);
            let homes = homes.iter().map(range).collect::<anyhow::Result<Vec<_>>>()?;
            Document::new(id, entry.tokens, homes).map_err(|error| match error {
                // The planner's name of the document means nothing to whoever wrote the step.
                InvalidAttention::BadHomes { tokens, detail, .. } => {
                    anyhow!("home does not add up to [0, {tokens}): {detail}")
                }
                other => other.into(),
            })?
        }
    };
    let document = document.with_tick(entry.tick);
    let Some(slices) = entry.mask else { return Ok(document) };
    let kv_heads = Span::to(geometry.kv_heads());
    let owner = slices::Owner { name: "document", heads_of: "model", geometry, kv_heads };
    Ok(document.with_mask(slices::mask(&slices, owner)?)?)
}

/// PLAN.json: who computes what.
#[derive(Debug, Serialize)]
pub(crate) struct PlanFile {
    tasks: Vec<TaskEntry>,
    /// Of documents that came without.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    homes: Vec<HomesEntry>,
    plan_seconds: f64,
}

/// Who holds which tokens of a document.
#[derive(Debug, Serialize)]
struct HomesEntry {
    document: u64,
    home: Vec<HomeEntry>,
}

#[derive(Debug, Serialize)]
struct TaskEntry {
    document: u64,
    q: [usize; 2],
    kv: [usize; 2],
    kv_heads: [usize; 2],
    server: u64,
    group: u32,
}

impl PlanFile {
    /// The plan in terms of the step's own ids, which `servers` and `documents` list in order of the planner's, with the homes
    /// that were `chosen`.
    pub(crate) fn new(
        plan: &StepPlan,
        chosen: &[&Document],
        servers: &[u64],
        documents: &[u64],
        plan_seconds: f64,
    ) -> PlanFile {
        let servers: BTreeMap<u32, u64> = (0..).zip(servers.iter().copied()).collect();
        let ends = |span: Span| [span.start(), span.end()];
        let task = |task: &outboard_attention::PlannedTask| {
            Some(TaskEntry {
                document: documents.get(task.document.index as usize).copied()?,
                q: ends(task.q),
                kv: ends(task.kv),
                kv_heads: ends(task.kv_heads),
                server: servers.get(&task.slot).copied()?,
                group: task.group,
            })
        };
        let home = |home: &HomeRange| HomeEntry {
            rank: home.rank,
            start: home.tokens.start(),
            end: home.tokens.end(),
        };
        let homes = |document: &&Document| {
            let home = document.homes().iter().map(home).collect();
            Some(HomesEntry { document: documents.get(document.id().index as usize).copied()?, home })
        };
        let tasks = plan.tasks().filter_map(|(_, t)| task(t)).collect();
        PlanFile { tasks, homes: chosen.iter().filter_map(homes).collect(), plan_seconds }
    }
}
