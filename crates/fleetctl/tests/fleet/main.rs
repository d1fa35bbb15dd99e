//! The whole fleet, as processes on real servers: its main job, bad input, and bad days. Every test ends with the same
//! look at what must hold afterwards: [`stage::Stage::ends_well`].

mod absent;
mod api;
mod bad_input;
mod events;
mod foreign;
mod kills;
mod load;
mod main_job;
mod other_arguments;
mod overrun;
mod rights;
mod scaling;
mod server_failures;
mod settings;
mod stage;
