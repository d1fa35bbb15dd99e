//! Threads for what takes longer than a thread that reads and writes HTTP may be held up.
//!
//! Under overload a queue that is served in turn answers everybody late, and nobody in time. Here nobody waits for longer than
//! `patience` for a thread, and those who have waited longest are the ones who are refused: once the first in the queue has
//! waited for a quarter of that, the last is served first.

use crate::error::Error;
use actix_web::rt::time::timeout;
use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Work, and whether somebody has taken it: a thread, or the one who gave it, who doesn't want it any more.
struct Job {
    taken: Arc<AtomicBool>,
    since: Instant,
    work: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    added: Condvar,
    patience: Duration,
    length_max: usize,
}

/// A number of threads and the queue before them. Cheap to clone; the threads end with the last clone.
#[derive(Clone)]
pub(crate) struct Threads(Arc<Handle>);

struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.added.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, job: Job) {
        let mut queue = self.lock();
        queue.forget();
        queue.jobs.push_back(job);
        if queue.jobs.len() > self.length_max {
            queue.jobs.pop_front();
        }
        let is_anybody_idle = queue.idle > 0;
        drop(queue);
        if is_anybody_idle {
            self.added.notify_one();
        }
    }

    fn run(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.next(self.patience) {
                drop(queue);
                (job.work)();
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self.added.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

impl Queue {
    /// The next job that somebody still waits for.
    fn next(&mut self, patience: Duration) -> Option<Job> {
        self.forget();
        let is_late = self.jobs.front().is_some_and(|first| first.since.elapsed() > patience / 4);
        let mut pop = || if is_late { self.jobs.pop_back() } else { self.jobs.pop_front() };
        loop {
            let job = pop()?;
            if !job.taken.swap(true, Ordering::AcqRel) {
                return Some(job);
            }
        }
    }

    /// Drops what nobody waits for any more from where it gathers.
    fn forget(&mut self) {
        while self.jobs.front().is_some_and(|job| job.taken.load(Ordering::Acquire)) {
            self.jobs.pop_front();
        }
    }
}

/// Takes a job back when its giver goes away.
struct Ticket(Arc<AtomicBool>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Threads {
    /// `count` threads, of which one is free within `patience` for whoever isn't to be refused.
    pub(crate) fn start(name: &str, count: usize, patience: Duration) -> Self {
        /// Whoever is behind more than that isn't served in time anyway, and is better told at once.
        const WAITING_FOR_EACH: usize = 16;
        let length_max = count * WAITING_FOR_EACH;
        let shared = Arc::new(Shared { queue: Mutex::default(), added: Condvar::new(), patience, length_max });
        for _ in 0..count {
            let shared = shared.clone();
            let thread = thread::Builder::new().name(name.into()).spawn(move || shared.run());
            thread.expect("a thread can be started");
        }
        Self(Arc::new(Handle(shared)))
    }

    /// Runs `work` on one of the threads. What isn't begun within the patience is refused; what isn't done by the deadline goes on,
    /// and nobody learns what came of it.
    ///
    /// # Errors
    /// [`Error::Overloaded`] and [`Error::TimedOut`]; [`Error::Internal`] when it panics.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let shared = &self.0.0;
        let now = Instant::now();
        let ticket = Ticket(Arc::default());
        let (sender, mut receiver) = oneshot::channel();
        let job = Job {
            taken: ticket.0.clone(),
            since: now,
            // Its panic's message is in the log already.
            work: Box::new(move || drop(sender.send(catch_unwind(AssertUnwindSafe(work))))),
        };
        shared.add(job);
        let limit = deadline.saturating_duration_since(now);
        let result = match timeout(shared.patience.min(limit), &mut receiver).await {
            Ok(result) => result,
            Err(_) if !ticket.0.swap(true, Ordering::AcqRel) => return Err(Error::Overloaded),
            Err(_) => timeout(deadline.saturating_duration_since(Instant::now()), receiver)
                .await
                .map_err(|_| Error::TimedOut)?,
        };
        match result {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(panic)) => Err(Error::Internal(told(panic.as_ref()).into())),
            // Others came after it, and there were too many.
            Err(_) => Err(Error::Overloaded),
        }
    }
}

fn told(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::rt::System;
    use futures_util::future::{join, join_all, join3};
    use std::sync::mpsc;

    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn what_a_busy_thread_does_not_come_to_is_refused_and_never_done() {
        let threads = Threads::start("test", 1, Duration::from_millis(50));
        let (release, held) = mpsc::channel::<()>();
        let done = Arc::new(AtomicBool::new(false));
        System::new().block_on(async {
            let deadline = Instant::now() + LATER;
            let (begin, begun) = oneshot::channel();
            let first = threads.run(deadline, move || {
                begin.send(()).unwrap();
                held.recv()
            });
            let others = (0..20).map(|_| {
                let done = done.clone();
                threads.run(deadline, move || done.store(true, Ordering::SeqCst))
            });
            let waiting = async {
                begun.await.unwrap();
                let refused = join_all(others).await;
                assert!(refused.iter().all(|result| matches!(result, Err(Error::Overloaded))), "{refused:?}");
                release.send(()).unwrap();
            };
            let (first, ()) = join(first, waiting).await;
            first.unwrap().unwrap();
            assert_eq!(threads.run(deadline, || 7).await.unwrap(), 7);
        });
        assert!(!done.load(Ordering::SeqCst));
    }

    #[test]
    fn the_newest_is_served_first_once_the_oldest_has_waited_for_long() {
        let threads = Threads::start("test", 1, LATER);
        let (release, held) = mpsc::channel::<()>();
        let order = Arc::new(Mutex::new(Vec::new()));
        System::new().block_on(async {
            let deadline = Instant::now() + 10 * LATER;
            let first = threads.run(deadline, move || held.recv());
            let others = join_all((0..4).map(|number| {
                let order = order.clone();
                threads.run(deadline, move || order.lock().unwrap().push(number))
            }));
            let waiting = async {
                let shared = threads.0.0.clone();
                while shared.lock().jobs.len() < 4 {
                    actix_web::rt::task::yield_now().await;
                }
                for job in &mut shared.lock().jobs {
                    job.since -= LATER;
                }
                release.send(()).unwrap();
            };
            let (first, others, ()) = join3(first, others, waiting).await;
            first.unwrap().unwrap();
            assert!(others.iter().all(Result::is_ok));
        });
        assert_eq!(*order.lock().unwrap(), [3, 2, 1, 0]);
    }

    #[test]
    fn a_panic_is_an_error_and_the_thread_goes_on() {
        let threads = Threads::start("test", 1, LATER);
        System::new().block_on(async {
            let deadline = Instant::now() + LATER;
            let failed = threads.run(deadline, || panic!("on purpose")).await;
            assert!(matches!(failed, Err(Error::Internal(error)) if error.to_string().contains("on purpose")));
            assert_eq!(threads.run(deadline, || 7).await.unwrap(), 7);
        });
    }
}
