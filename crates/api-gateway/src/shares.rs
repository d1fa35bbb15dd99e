//! Shares of what requests wait for: one thing that is held up mustn't hold up everything.

use crate::{error::Error, gateway::before};
use domain::{TweetId, UserId};
use std::{
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Instant,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a request may have to wait for, which others may hold.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Subject<'a> {
    /// An author's lock, or a user's row.
    User(UserId),
    /// A tweet's row, and its author's lock.
    Tweet(TweetId),
    /// The login that a new user is to have.
    Login(&'a str),
    /// An account's head.
    Account(&'a str),
    /// Heads of any accounts.
    Accounts,
    /// The numbers of the message log.
    Log,
    /// So many rows that it takes long.
    Rows,
}

/// How many requests may take threads at the same time for the same subject. A permit goes with the work, to its end.
pub(crate) struct Shares {
    /// By the subject's hash. That two have the same does little harm.
    single: Vec<Arc<Semaphore>>,
    accounts: Arc<Semaphore>,
    log: Arc<Semaphore>,
    rows: Arc<Semaphore>,
    hasher: RandomState,
}

impl Shares {
    /// A single subject has an eighth of so many threads at most, and each of the others a quarter, so that some are left
    /// whatever is held up.
    pub(crate) fn of(threads: usize) -> Self {
        const SUBJECTS: usize = 1024;
        let part = |of: usize| Arc::new(Semaphore::new((threads / of).max(1)));
        Self {
            single: (0..SUBJECTS).map(|_| part(8)).collect(),
            accounts: part(4),
            log: part(4),
            rows: part(4),
            hasher: RandomState::new(),
        }
    }

    fn of_subject(&self, subject: Subject<'_>) -> &Arc<Semaphore> {
        match subject {
            Subject::Accounts => &self.accounts,
            Subject::Log => &self.log,
            Subject::Rows => &self.rows,
            _ => &self.single[self.hasher.hash_one(subject) as usize % self.single.len()],
        }
    }

    /// Waits for a share of each, until the deadline at most.
    pub(crate) async fn take(
        &self,
        subjects: &[Subject<'_>],
        deadline: Instant,
    ) -> Result<Vec<OwnedSemaphorePermit>, Error> {
        let mut permits = Vec::with_capacity(subjects.len());
        for subject in subjects {
            let permit = before(deadline, self.of_subject(*subject).clone().acquire_owned()).await;
            permits.push(permit.map_err(|_| Error::Overloaded)?.expect("it's never closed"));
        }
        Ok(permits)
    }
}
