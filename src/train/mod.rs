//! `outboard train`: the main job. Starts a coordinator, the attention servers and the ranks, trains, and reports.

mod args;
mod child;
mod cluster;
mod documents;
mod forecast;
pub(crate) mod job;
mod probe;
mod protocol;
pub(crate) mod rank;
mod report;
mod show;
mod table;

use std::time::Duration;

use anyhow::{Context, bail};

pub(crate) use args::Args;

use crate::lifetime;
use cluster::Cluster;
use documents::FixedHomes;
use forecast::Outlook;
use job::JobLine;
use outboard_proto::describe;
use protocol::{FromRank, Mode, RankStep};
use report::Record;
use show::Show;

/// How long a rank may take for one step, or to set itself up. What hangs earlier than this is named by the ranks and
/// the coordinator themselves, whose limits are shorter.
const STEP_LIMIT: Duration = Duration::from_secs(900);

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let plan = args.into_run()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = train(&plan) => outcome,
            signal = lifetime::signalled() => bail!("stopped by {}; all processes of the run have ended", signal?),
        }
    });
    // Whatever still runs in the background belongs to the run that has just ended.
    runtime.shutdown_timeout(Duration::from_secs(5));
    outcome
}

async fn train(run: &args::Run) -> anyhow::Result<()> {
    let mut show = Show::new(run)?;
    let mut cluster = Cluster::start(run).await?;
    show.job(&JobLine::of(run))?;
    say_outlook(run, &cluster, &mut show)?;
    cluster.begin(run).await?;
    show.started(&cluster);
    let outcome = follow(run, &mut cluster, &mut show).await;
    show.progress_ends();
    match outcome {
        Ok(mut record) => {
            let counted = cluster.count_tasks(&mut record).await;
            show.summary(&record)?;
            counted?;
            cluster.finish().await?;
            check(run, &record)
        }
        Err(error) => {
            // Dropping the cluster kills what is left of it.
            drop(cluster);
            Err(error)
        }
    }
}

/// Says before the job starts what balance is predicted to gain. A run trains whatever that is.
fn say_outlook(run: &args::Run, cluster: &Cluster, show: &mut Show) -> anyhow::Result<()> {
    if !run.pooled() {
        return Ok(());
    }
    let unknown = match (run.unlike_servers(), cluster.speeds()) {
        (Some(why), _) => why,
        (None, None) => "a rank could not measure its speed",
        (None, Some(speeds)) => match Outlook::new(run, &speeds) {
            Ok(Some(outlook)) => return show.outlook(&outlook),
            Ok(None) => "the run has no rank",
            Err(error) => {
                show.warn(&format!("no gain is predicted: {}", describe(error.as_ref())));
                return Ok(());
            }
        },
    };
    show.say(&format!("no gain is predicted: {unknown}"));
    Ok(())
}

/// Follows all steps of all trainings.
async fn follow(run: &args::Run, cluster: &mut Cluster, show: &mut Show) -> anyhow::Result<Record> {
    let (layers, dtype) = (run.model.layers as u64, run.model.attention_dtype.to_string());
    let servers_like_ranks = run.unlike_servers().is_none();
    let placed = run.placement.is_some();
    let mut record = Record { layers, dtype, placed, servers_like_ranks, ..Record::default() };
    let mut fixed_homes = FixedHomes::new(run)?;
    for step in 0..run.train.steps {
        for turn in 0..run.modes.len() {
            let ranks = step_of_all_ranks(cluster).await?;
            let first = ranks.first().context("a run needs at least one rank")?;
            if let Some(other) = ranks.iter().find(|r| (r.step, r.mode) != (first.step, first.mode)) {
                bail!("ranks are out of step: {} and {}", first.step, other.step);
            }
            if let Some(other) = ranks.iter().find(|r| r.loss.to_bits() != first.loss.to_bits()) {
                bail!("step {step}: ranks disagree about the loss: {} and {}", first.loss, other.loss);
            }
            if first.mode == Mode::Pool {
                match fixed_homes.bytes(step) {
                    Ok(bytes) => record.fixed_homes.extend(bytes.map(|bytes| (step, bytes))),
                    // A figure for comparison stops no training.
                    Err(error) => {
                        show.warn(&format!("not compared with fixed homes: {}", describe(error.as_ref())))
                    }
                }
            }
            if let Some(line) = record.line(&ranks) {
                show.step(&line, turn + 1 == run.modes.len())?;
            }
            record.steps.push(ranks);
        }
    }
    cluster.expect_done(STEP_LIMIT).await?;
    Ok(record)
}

async fn step_of_all_ranks(cluster: &mut Cluster) -> anyhow::Result<Vec<RankStep>> {
    let mut steps = Vec::with_capacity(cluster.ranks.len());
    for message in cluster.next_of_each(STEP_LIMIT).await? {
        match message {
            FromRank::Step(step) => steps.push(step),
            other => bail!("a rank said {other:?} where a step was expected"),
        }
    }
    Ok(steps)
}

/// The run's own promises: no task left out, and equal losses.
fn check(run: &args::Run, record: &Record) -> anyhow::Result<()> {
    let Some(summary) = record.summary() else { return Ok(()) };
    let (planned, computed) = (summary.tasks_planned, summary.tasks_computed);
    let accepted = record.tasks_accepted();
    if accepted != planned {
        bail!("ranks took the results of {accepted} tasks, the plans hold {planned}");
    }
    // A server that is gone took its counters with it, and servers of an outside coordinator may work for others too.
    let own_pool = run.coordinator.is_none();
    let expected =
        if own_pool && summary.tasks_resent == 0 { computed == planned } else { computed >= planned };
    if record.counters_complete && !expected {
        bail!("the servers' counters show {computed} tasks computed, the plans hold {planned}");
    }
    match summary.max_relative_loss_difference {
        Some(difference) if difference > run.loss_tolerance => bail!(
            "local and pooled losses differ by {difference:.1e} relative; more than {:.1e} means that some attention is \
             wrong",
            run.loss_tolerance
        ),
        _ => Ok(()),
    }
}
