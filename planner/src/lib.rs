//! The planner: who computes which piece of a step's core attention. `plan(problem) -> plan`, pure.
//!
//! # Goals
//! 1. Balance. In every tick, cells over weight of the busiest slot stay within `1 + tolerance` of the mean. Where rates
//!    are given, the least layer time instead.
//! 2. Few bytes. Work starts where its queries live; only the excess of busy slots moves, in few, large slices.
//! 3. Pieces. A slot's work in a tick comes as at least 8 tasks, none above a quarter of it, so that the work of a
//!    server that dies spreads over all that are left. Excepted are slots with less work than 512 rows as heavy as
//!    their heaviest, of one kv head.
//!
//! # What is guaranteed
//! - Every cell of every document lies in exactly one task ([`outboard_attention::StepPlan::check`]); no task is
//!   empty, and no task's queries or keys reach beyond the first and last that its part of the mask uses.
//! - The plan is a function of documents, homes, geometry, slots, tolerance, rates, profile and layers kept (homes that are chosen: of the slack too). The order in which documents
//!   come does not matter; no clock, randomness or hash order enters, and floating point only as IEEE basic operations,
//!   so any machine makes the same plan. Measured speeds and membership are no input.
//! - No slot holds more of others' tokens than its memory allows; where that cannot be had, there is no plan.
//! - Cuts are by query rows and by kv heads, and by keys where that costs fewer bytes: only causal documents are cut
//!   so. Rows are cut at multiples of 128 tokens, or of 64, 32 and so on where a block of 128 is too much work to
//!   balance. Without rates and profile, balance is then within the tolerance or one row.
//! - Where rates are given, without a profile and with memory for it, a layer of one tick takes no longer than without a
//!   pool, if every home has a slot, nor than by DistCA's planner at its tolerances 0, 0.05 and 0.1, if that prices no
//!   more than 2^25 items.
//! - Tasks of one document on one slot share their kv-head ranges or have none in common; those of one range form a
//!   reduction group.
//! - No input makes it panic: what it cannot plan is a [`PlanError`] that names the field and the value.
//!
//! # How it works
//! [`plan()`] takes each tick by itself. `start` puts every row on its home's slot, and documents of ranks without one
//! where there is room; `kin` gives rows to slots that have their keys already; `balance` decides who gives how much to whom,
//! at first greedily, then by a `search` that deals receivers out anew; `cut` lays out the slices that cost the fewest bytes (priced by `cost`, added up by `moved`), in
//! several ways; `split` cuts what each slot holds into pieces; `group` orders the tasks and numbers the reduction groups. [`judge()`] says what
//! any plan is worth, however it was made; [`Loads`] and [`Traffic`] are its figures of each slot, [`Flow`] those of each
//! home and slot. Where rates are given, `trade` does this at several tolerances and keeps what takes the least layer time.
//! A [`Profile`] is the cost model: it predicts what a task takes by its shape ([`Times`] those of a plan); where one is
//! given, slots are weighed by what it makes of their work. [`Speeds`]
//! compares servers by what they have measured; it enters no plan, only where tasks are placed. What no plan does better
//! is in [`least_bytes()`] and [`least_seconds()`]. [`Forecast`] says from a plan and the cost of the rest
//! of the model how much shorter a step becomes, and whether that is worth it.
//!
//! # Rivals
//! [`plan_by()`] plans the same problem by other policies, so that plans can be compared. Theirs hold what is said above
//! of cells, tasks, order and errors; nothing of balance, block borders or the number of pieces.
//!
//! | policy | what it is | after |
//! |---|---|---|
//! | `outboard` | [`plan()`] | |
//! | `fixed` | every row is computed where it lives | data parallelism without any balancing |
//! | `wlb` | whole documents, most work first, each to the slot with the least | variable-length packing of WLB-LLM, [arXiv 2503.17924](https://arxiv.org/abs/2503.17924), without its limit on tokens and without putting documents off |
//! | `cp` | each document in `2 N` chunks for `N` slots, slot `i` computes chunks `i` and `2 N - 1 - i` | head-tail context parallelism of each document, as in WLB-LLM and Megatron-LM |
//! | `distca` | slots that lack work take rows with all kv heads and whole key prefixes, fewest bytes per FLOP first | DistCA, [arXiv 2510.18121](https://arxiv.org/abs/2510.18121), and the planner in its [code](https://github.com/hao-ai-lab/DistCA) |
//!
//! ```
//! use outboard_attention::{Document, DocumentId, HeadGeometry, HomeRange, Span};
//! use outboard_planner::{Loads, Problem, Slot, plan};
//!
//! let document = |rank, tokens| {
//!     let home = HomeRange { rank, tokens: Span::to(tokens) };
//!     Document::new(DocumentId { rank, index: 0 }, tokens, vec![home])
//! };
//! let documents = vec![document(0, 65_536)?, document(1, 8_191)?];
//! let problem = Problem::new(HeadGeometry::standard(32, 8, 128)?, documents, vec![Slot::in_place(0), Slot::in_place(1)]);
//! let plan = plan(&problem)?;
//! let loads = Loads::planned(&plan, &problem.documents, &problem.geometry);
//! assert!(loads.max_over_mean() < 1.01);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod balance;
mod bound;
mod cost;
mod cut;
mod error;
mod flows;
mod forecast;
mod group;
mod homes;
mod judge;
mod kin;
mod loads;
mod memory;
mod moved;
mod plan;
mod policy;
mod problem;
mod profile;
mod rows;
mod search;
mod sheet;
mod speed;
mod split;
mod start;
mod trade;
mod traffic;

pub use bound::{least_bytes, least_seconds};
pub use error::PlanError;
pub use flows::{Carried, Flow};
pub use forecast::{Doubt, Forecast, StepCosts};
pub use homes::{Settled, settle};
pub use judge::{Fault, PassVerdict, Rates, TILE, Verdict, judge};
pub use loads::Loads;
pub use plan::plan;
pub use policy::{DISTCA_TOLERANCE, Policy, UnknownPolicy, plan_by};
pub use problem::{DEFAULT_TOLERANCE, MIN_LINK, Problem, Slot};
pub use profile::{Grid, Profile, TaskShape, Times};
pub use speed::{Sample, Speeds};
pub use traffic::{Pass, Traffic};
