//! Working on events, on the threads of the pool.

use crate::{Handler, engine::SharedLanes, lanes::Task, outcome::Outcome};
use anyhow::anyhow;
use crossbeam_channel::Sender;
use domain::Failure;
use std::{sync::Arc, time::Instant};

/// What a thread of the pool needs.
pub(crate) struct Work<H: Handler> {
    pub(crate) handler: Arc<H>,
    pub(crate) lanes: SharedLanes,
    /// To the recorder.
    pub(crate) outcomes: Sender<Outcome<H::Done>>,
}

impl<H: Handler> Work<H> {
    /// Works on an event.
    pub(crate) fn on(&self, task: Task) {
        let outcome = if self.lanes.lock().start(&task, Instant::now()) {
            let worked = process::catch(|| self.handler.work(&task.event))
                .unwrap_or_else(|panic| Err(Failure::Transient(anyhow!("its handler {panic}"))));
            self.lanes.lock().worked(&task);
            match worked {
                Ok(done) => Outcome::Done(task, done),
                Err(failure) => Outcome::Failed(task, failure),
            }
        } else if task.on_record {
            Outcome::Dropped(task)
        } else {
            return;
        };
        // The recorder outlives the pool's work; if it has died of a bug, the process ends.
        let _ = self.outcomes.send(outcome);
    }
}
