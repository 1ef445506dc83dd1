//! What the planner's tests share: random steps, and what every plan must hold.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

pub mod checks;
pub mod steps;
