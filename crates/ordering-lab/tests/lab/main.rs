//! The lab's program on real servers: what each experiment shows, bad input, and what is left when it ends early.

mod bad_input;
mod by_hand;
mod ends;
mod experiments;
mod stage;
