//! What can be shown, by name.

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
