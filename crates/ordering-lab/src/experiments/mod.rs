//! The experiments.

mod balance;
mod competing;
mod hash;
mod killer;
mod message_version;
mod prefetch;
mod redelivery;
mod restart;
mod sequenced;

use crate::{experiment::Experiment, lab::Lab, report::Report};

/// Does one.
pub(crate) fn run(experiment: Experiment, lab: &mut Lab) -> anyhow::Result<Report> {
    match experiment {
        Experiment::Competing => competing::run(lab),
        Experiment::ConsistentHash => hash::consistent_hash(lab),
        Experiment::AddConsumers => hash::add_consumers(lab),
        Experiment::DrainFirst => hash::drain_first(lab),
        Experiment::Balance => balance::run(lab),
        Experiment::MessageVersion => message_version::run(lab),
        Experiment::Prefetch => prefetch::run(lab),
        Experiment::Killer => killer::run(lab),
        Experiment::Redelivery => redelivery::run(lab),
        Experiment::Restart => restart::run(lab),
        Experiment::Sequenced => sequenced::run(lab),
    }
}
