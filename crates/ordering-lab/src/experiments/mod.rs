//! The experiments, and how they are asked for.

mod balance;
mod competing;
mod hash;
mod killer;
mod message_version;
mod prefetch;
mod redelivery;
mod restart;
mod sequenced;

use crate::{lab::Lab, report::Report};
use clap::ValueEnum;
use serde::{Serialize, Serializer};
use std::fmt;

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Experiment {
    Competing,
    ConsistentHash,
    AddConsumers,
    DrainFirst,
    Balance,
    MessageVersion,
    Prefetch,
    Killer,
    Redelivery,
    Restart,
    Sequenced,
}

impl Experiment {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().expect("no experiment is hidden").get_name().to_owned()
    }

    /// Does it.
    pub(crate) fn run(self, lab: &mut Lab) -> anyhow::Result<Report> {
        match self {
            Self::Competing => competing::run(lab),
            Self::ConsistentHash => hash::consistent_hash(lab),
            Self::AddConsumers => hash::add_consumers(lab),
            Self::DrainFirst => hash::drain_first(lab),
            Self::Balance => balance::run(lab),
            Self::MessageVersion => message_version::run(lab),
            Self::Prefetch => prefetch::run(lab),
            Self::Killer => killer::run(lab),
            Self::Redelivery => redelivery::run(lab),
            Self::Restart => restart::run(lab),
            Self::Sequenced => sequenced::run(lab),
        }
    }
}

impl fmt::Display for Experiment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name())
    }
}

impl Serialize for Experiment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name())
    }
}
