//! What the lab's exchanges and queues are called, and which there can be: so that those of a run that crashed are found.

use crate::experiment::Experiment;
use domain::topology::{Binding, Exchange, ExchangeKind, Expiry, Queue, Topology};

/// The most consumers of an experiment, before others join them.
pub(crate) const CONSUMERS_MAX: u32 = 16;

/// The stream of `sequenced`, which is its exchange as well.
pub(crate) const STREAM: &str = "lab.sequenced";

/// There while the fleet's exchanges and queues are there only because of the lab.
pub(crate) const GUEST: &str = "lab.guest";

/// An experiment's exchange.
pub(crate) fn exchange(experiment: Experiment) -> String {
    format!("lab.{experiment}")
}

/// The queue of an experiment's consumer.
pub(crate) fn queue(experiment: Experiment, consumer: u32) -> String {
    format!("lab.{experiment}.{consumer:02}")
}

/// The queues that an experiment can have.
pub(crate) fn queues(experiment: Experiment) -> Vec<String> {
    (1..=2 * CONSUMERS_MAX).map(|consumer| queue(experiment, consumer)).collect()
}

/// An experiment's exchange and these queues, unbound.
pub(crate) fn unbound(experiment: Experiment, kind: ExchangeKind, queues: &[String]) -> Topology {
    let queue = |name: &String| Queue { name: name.clone(), expiry: Expiry::Never };
    Topology {
        exchanges: vec![Exchange { name: exchange(experiment), kind }],
        queues: queues.iter().map(queue).collect(),
        bindings: Vec::new(),
    }
}

/// Bindings of these queues to the experiment's exchange, in this order.
pub(crate) fn bindings(experiment: Experiment, queues: &[String], weight: &str) -> Topology {
    let binding = |queue: &String| Binding {
        exchange: exchange(experiment),
        queue: queue.clone(),
        routing_key: weight.to_owned(),
    };
    Topology { bindings: queues.iter().map(binding).collect(), ..Topology::default() }
}
