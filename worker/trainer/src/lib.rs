//! The reference model and trainer.
