//! Threads for the lanes: as many as are busy at a time, up to a limit.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// Enough for a handler that calls a client library; only what is touched takes memory.
const STACK_BYTES: usize = 512 * 1024;

/// Runs tasks on threads that it starts when none is idle.
pub(crate) struct Pool<T> {
    shared: Arc<Shared<T>>,
    limit: usize,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    run: Box<dyn Fn(T) + Send + Sync>,
}

struct State<T> {
    queue: VecDeque<T>,
    /// Threads that wait for a task. Each of them takes one, so those that are called and not yet awake count too.
    idle: usize,
    threads: usize,
    closed: bool,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(task) = state.queue.pop_front() {
                drop(state);
                (self.run)(task);
                state = self.state();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

impl<T: Send + 'static> Pool<T> {
    /// A pool of at most `limit` threads that run tasks by `run`, which doesn't panic.
    pub(crate) fn new(limit: usize, run: impl Fn(T) + Send + Sync + 'static) -> Self {
        let state = State { queue: VecDeque::new(), idle: 0, threads: 0, closed: false };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new(), run: Box::new(run) };
        Self { shared: Arc::new(shared), limit }
    }

    /// Runs the tasks, in their order as far as threads are free.
    pub(crate) fn submit(&self, tasks: impl IntoIterator<Item = T>) {
        let mut state = self.shared.state();
        for task in tasks {
            state.queue.push_back(task);
            if state.queue.len() <= state.idle {
                self.shared.changed.notify_one();
            } else if state.threads < self.limit {
                let shared = self.shared.clone();
                let thread = thread::Builder::new().name("lane".into()).stack_size(STACK_BYTES);
                match thread.spawn(move || shared.work()) {
                    Ok(_) => state.threads += 1,
                    Err(error) if state.threads == 0 => panic!("can't start a thread: {error}"),
                    // Those that there are will come to it.
                    Err(error) => log::warn!("can't start a thread beside {}: {error}", state.threads),
                }
            }
        }
    }
}

impl<T> Drop for Pool<T> {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, sync::mpsc, thread::ThreadId, time::Duration};

    #[test]
    fn tasks_run_side_by_side_up_to_the_limit_and_threads_are_used_again() {
        let (begun, begins) = mpsc::channel::<ThreadId>();
        let (end, ends) = mpsc::channel::<()>();
        let ends = Mutex::new(ends);
        let pool = Pool::new(3, move |()| {
            begun.send(thread::current().id()).unwrap();
            ends.lock().unwrap().recv().unwrap();
        });
        pool.submit([(); 5]);
        let patience = Duration::from_secs(60);
        let mut threads: HashSet<_> = (0..3).map(|_| begins.recv_timeout(patience).unwrap()).collect();
        assert_eq!(threads.len(), 3);
        assert!(begins.recv_timeout(Duration::from_millis(50)).is_err(), "a fourth one began");
        (0..5).for_each(|_| end.send(()).unwrap());
        threads.extend((0..2).map(|_| begins.recv_timeout(patience).unwrap()));
        assert_eq!(threads.len(), 3);
    }
}
