//! One compute thread a rank.
//!
//! candle splits products and long elementwise loops over threads whose number it reads from the environment, once. A
//! rank owns one core, so the process that launches ranks must set these variables for them; a process cannot safely
//! set its own.

use crate::TrainerError;

/// What the environment of a rank's process must hold.
pub const LAUNCH_ENVIRONMENT: [(&str, &str); 2] = [("RAYON_NUM_THREADS", "1"), ("CANDLE_NUM_THREADS", "1")];

/// Checks that this process was launched with [`LAUNCH_ENVIRONMENT`].
///
/// # Errors
/// [`TrainerError::TooManyThreads`] when more than one thread would compute.
pub fn require_one_thread() -> Result<(), TrainerError> {
    let of_candle = std::env::var("CANDLE_NUM_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let threads = candle_core::utils::get_num_threads().max(of_candle);
    if threads == 1 { Ok(()) } else { Err(TrainerError::TooManyThreads { threads }) }
}
