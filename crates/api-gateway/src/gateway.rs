//! What handlers work with: the settings, and the database and password hashing off the threads that read and write HTTP.

use crate::{
    body::Budget,
    error::{Error, chain},
    settings::HttpSettings,
    shares::{Shares, Subject},
    threads::Threads,
};
use actix_web::{HttpRequest, rt::time::timeout, web};
use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use storage::{Database, PgConnection, migrations};
use telemetry::{DatabaseAvailable, DatabaseUnavailable};

/// One for each worker.
pub(crate) struct Gateway {
    pub(crate) http: HttpSettings,
    shared: Shared,
}

/// What all workers share.
#[derive(Clone)]
pub(crate) struct Shared {
    database: Database,
    /// Each has a connection when it needs one.
    database_threads: Threads,
    /// As many as workers: what they do takes a core.
    computing_threads: Threads,
    shares: Arc<Shares>,
    /// Bytes of request bodies, and of answers.
    bodies: Budget,
    answers: Budget,
    /// Since when the database is away, as far as requests tell.
    away_since: Arc<Mutex<Option<Instant>>>,
    /// Whether the schema was found to be complete; it won't lose anything later.
    migrated: Arc<AtomicBool>,
}

impl Shared {
    pub(crate) fn new(database: Database, http: &HttpSettings) -> Self {
        /// Passwords are hashed one after another: who comes in a crowd may wait for some.
        const COMPUTING_PATIENCE: Duration = Duration::from_secs(3);
        let patience = Duration::from_millis(http.queue_timeout_ms);
        Self {
            database,
            database_threads: Threads::start("database", http.blocking_threads, patience),
            computing_threads: Threads::start("computing", http.workers, COMPUTING_PATIENCE),
            shares: Arc::new(Shares::of(http.blocking_threads)),
            bodies: Budget::of(http.body_budget_bytes),
            answers: Budget::of(http.answer_budget_bytes),
            away_since: Arc::default(),
            migrated: Arc::default(),
        }
    }

    /// Whether the database answers and has every migration.
    pub(crate) fn is_migrated(&self) -> storage::Result<bool> {
        let known = self.migrated.load(Ordering::Relaxed);
        let look = || match known {
            true => self.database.ping().map(|()| true),
            false => Ok(!migrations::are_pending(&mut **self.database.connection()?)?),
        };
        let migrated = self.note(look())?;
        self.migrated.store(migrated, Ordering::Relaxed);
        Ok(migrated)
    }

    /// Logs when the database goes away and when it's back, rather than each request that meets it.
    fn note<T>(&self, result: storage::Result<T>) -> storage::Result<T> {
        let mut away_since = self.away_since.lock().unwrap_or_else(PoisonError::into_inner);
        match (&result, *away_since) {
            (Err(storage::Error::Unavailable(error)), None) => {
                *away_since = Some(Instant::now());
                telemetry::emit(DatabaseUnavailable { error: &chain(error.as_ref()), retry_in: None });
            }
            (Err(storage::Error::Unavailable(_)), Some(_)) | (_, None) => {}
            (_, Some(since)) => {
                *away_since = None;
                telemetry::emit(DatabaseAvailable { after: since.elapsed() });
            }
        }
        result
    }
}

impl Gateway {
    pub(crate) fn new(http: HttpSettings, shared: Shared) -> Self {
        Self { http, shared }
    }

    /// The gateway that serves this request.
    pub(crate) fn of(req: &HttpRequest) -> &web::Data<Self> {
        req.app_data().expect("every app is built with a gateway")
    }

    /// When a usual request must have been answered.
    pub(crate) fn soon(&self) -> Instant {
        Instant::now() + self.http.request_timeout()
    }

    /// When a request that writes many rows must have been answered.
    pub(crate) fn later(&self) -> Instant {
        Instant::now() + self.http.long_request_timeout()
    }

    /// Where bodies that are read are counted.
    pub(crate) fn bodies(&self) -> &Budget {
        &self.shared.bodies
    }

    /// Where answers that are on their way are counted.
    pub(crate) fn answers(&self) -> &Budget {
        &self.shared.answers
    }

    /// Runs queries outside of a transaction, so that a single one is a single round trip.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut PgConnection) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.work(&[], self.soon(), |database| query(&mut **database.connection()?)).await
    }

    /// Runs `work` in one transaction, repeating it where another came first. The subjects are what it may have to wait for.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        subjects: &[Subject<'_>],
        deadline: Instant,
        work: impl FnMut(&mut PgConnection) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.work(subjects, deadline, |database| database.transaction(work)).await
    }

    async fn work<T: Send + 'static>(
        &self,
        subjects: &[Subject<'_>],
        deadline: Instant,
        work: impl FnOnce(&Database) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let shares = self.shared.shares.take(subjects, deadline).await?;
        let shared = self.shared.clone();
        let work = move || {
            // To its own end: whoever waited for it may be gone sooner.
            let _shares = shares;
            shared.note(work(&shared.database))
        };
        self.shared.database_threads.run(deadline, work).await?.map_err(Error::from)
    }

    /// Runs what takes longer than a thread that reads and writes HTTP may be held up.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.shared.computing_threads.run(self.soon(), work).await
    }

    /// Does the same with work that takes the memory of hashing a password.
    pub(crate) async fn hash<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut password::Memory) -> T + Send + 'static,
    ) -> Result<T, Error> {
        thread_local! {
            /// One for each thread that hashes: what is allocated for each hash stays with each thread that ever has.
            static MEMORY: RefCell<password::Memory> = RefCell::default();
        }
        self.compute(move || MEMORY.with_borrow_mut(work)).await
    }

    /// Whether requests can be served.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        const PATIENCE: Duration = Duration::from_secs(2);
        let shared = self.shared.clone();
        let threads = &self.shared.database_threads;
        match threads.run(Instant::now() + PATIENCE, move || shared.is_migrated()).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::NotReady("the database lacks migrations")),
            Ok(Err(error)) => Err(error.into()),
            Err(Error::TimedOut) => Err(Error::NotReady("the database doesn't answer")),
            Err(error) => Err(error),
        }
    }
}

/// What `work` returns, unless that takes longer than to the deadline.
pub(crate) async fn before<F: Future>(deadline: Instant, work: F) -> Result<F::Output, Error> {
    timeout(deadline.saturating_duration_since(Instant::now()), work).await.map_err(|_| Error::TimedOut)
}
