//! One compute thread a rank.
//!
//! candle splits products and long elementwise loops over threads whose number it reads from the environment, once. A
//! rank owns one core, so the process that launches ranks must set these variables for them; a process cannot safely
//! set its own. The third variable has the allocator keep a step's activations for the next step: returning them to
//! the system and faulting them in again takes a third as long as computing them.

use crate::TrainerError;

/// What the environment of a rank's process must hold.
pub const LAUNCH_ENVIRONMENT: [(&str, &str); 3] =
    [("RAYON_NUM_THREADS", "1"), ("CANDLE_NUM_THREADS", "1"), ("MIMALLOC_PURGE_DELAY", "-1")];

/// Checks that this process was launched for one compute thread, as [`LAUNCH_ENVIRONMENT`] asks.
///
/// # Errors
/// [`TrainerError::TooManyThreads`] when more than one thread would compute.
pub fn require_one_thread() -> Result<(), TrainerError> {
    let of_candle = std::env::var("CANDLE_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let threads = candle_core::utils::get_num_threads().max(of_candle);
    if threads == 1 { Ok(()) } else { Err(TrainerError::TooManyThreads { threads }) }
}
