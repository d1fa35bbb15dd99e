use std::{
    mem,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Something to be done at once rather than at its time.
#[derive(Default)]
pub(crate) struct Signal {
    given: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    pub(crate) fn give(&self) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for the signal, but not longer than `limit`; takes it, and says whether it was given.
    pub(crate) fn take(&self, limit: Duration) -> bool {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut given, _) =
            self.changed.wait_timeout_while(given, limit, |given| !*given).unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut *given)
    }
}
