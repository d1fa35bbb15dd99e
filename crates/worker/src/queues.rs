//! What a worker consumes, which may change while it runs.

use domain::{Failure, topology::Topology};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Says what there is to be declared at the moment.
type Source = dyn Fn() -> Result<Topology, Failure> + Send + Sync;

/// The queues of a worker, shared with whoever changes them.
#[derive(Clone, Default)]
pub struct Queues {
    listed: Arc<Mutex<Listed>>,
    topology: Option<Arc<Source>>,
}

#[derive(Default)]
struct Listed {
    /// Goes up with each change.
    version: u64,
    names: Vec<String>,
}

impl Queues {
    /// None for the time being. On each connection is declared, after the fleet's own topology, what `topology` says then: a
    /// process that was frozen meanwhile knows of queues that there aren't any more.
    pub fn declared_by(topology: impl Fn() -> Result<Topology, Failure> + Send + Sync + 'static) -> Self {
        Self { listed: Arc::default(), topology: Some(Arc::new(topology)) }
    }

    /// Consume these from now on.
    pub fn set(&self, names: Vec<String>) {
        let mut listed = self.listed();
        listed.version += 1;
        listed.names = names;
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.listed().names.clone()
    }

    pub(crate) fn topology(&self) -> Result<Topology, Failure> {
        self.topology.as_ref().map_or_else(|| Ok(Topology::default()), |topology| topology())
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
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<String>> for Queues {
    fn from(names: Vec<String>) -> Self {
        let queues = Self::default();
        queues.listed().names = names;
        queues
    }
}
