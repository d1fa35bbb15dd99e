//! What a worker consumes, which may change while it runs.

use domain::topology::Topology;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The queues of a worker, shared with whoever changes them.
#[derive(Clone, Default)]
pub struct Queues(Arc<Mutex<Listed>>);

#[derive(Default)]
struct Listed {
    /// Goes up with each change.
    version: u64,
    names: Vec<String>,
    topology: Topology,
}

impl Queues {
    /// None for the time being.
    pub fn none() -> Self {
        Self::default()
    }

    /// Consume these from now on. On each connection the topology is declared first, after the fleet's own.
    pub fn set(&self, names: Vec<String>, topology: Topology) {
        let mut listed = self.listed();
        listed.version += 1;
        listed.names = names;
        listed.topology = topology;
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.listed().names.clone()
    }

    pub(crate) fn topology(&self) -> Topology {
        self.listed().topology.clone()
    }

    /// The names, if they have changed since `version`, which is brought up to date.
    pub(crate) fn changed_since(&self, version: &mut u64) -> Option<Vec<String>> {
        let listed = self.listed();
        (listed.version != *version).then(|| {
            *version = listed.version;
            listed.names.clone()
        })
    }

    fn listed(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<String>> for Queues {
    fn from(names: Vec<String>) -> Self {
        let queues = Self::none();
        queues.listed().names = names;
        queues
    }
}
