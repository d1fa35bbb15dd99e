//! What handlers work with: the settings, and the database and password hashing off the threads that read and write HTTP.

use crate::{
    error::{Error, chain},
    settings::HttpSettings,
};
use actix_web::{HttpRequest, rt::time::timeout, web};
use futures_util::lock::Mutex as AsyncMutex;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use storage::{Database, PgConnection, migrations};
use telemetry::{DatabaseAvailable, DatabaseUnavailable};

/// One for each worker; a worker's blocking threads are its own, too.
pub(crate) struct Gateway {
    pub(crate) http: HttpSettings,
    shared: Shared,
    /// Held while a password is estimated and hashed: by one blocking thread of this worker at most, the others are for the
    /// database.
    hashing: Arc<AsyncMutex<()>>,
}

/// What all workers share.
#[derive(Clone)]
pub(crate) struct Shared {
    database: Database,
    /// Since when the database is away, as far as requests tell.
    away_since: Arc<Mutex<Option<Instant>>>,
    /// Whether the schema was found to be complete; it won't lose anything later.
    migrated: Arc<AtomicBool>,
}

impl Shared {
    pub(crate) fn new(database: Database) -> Self {
        Self { database, away_since: Arc::default(), migrated: Arc::default() }
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
        Self { http, shared, hashing: Arc::default() }
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

    /// Runs queries outside of a transaction, so that a single one is a single round trip.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut PgConnection) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.work(self.soon(), |database| query(&mut **database.connection()?)).await
    }

    /// Runs `work` in one transaction, repeating it where another came first.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnMut(&mut PgConnection) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.work(deadline, |database| database.transaction(work)).await
    }

    async fn work<T: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce(&Database) -> storage::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = self.shared.clone();
        block(deadline, move || shared.note(work(&shared.database))).await?.map_err(Error::from)
    }

    /// Runs what takes longer than a thread that reads and writes HTTP may be held up.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        block(self.soon(), work).await
    }

    /// Does the same with work of which each worker does one at a time: what a password costs.
    pub(crate) async fn compute_alone<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = self.soon();
        let permit = before(deadline, self.hashing.clone().lock_owned()).await?;
        block(deadline, move || {
            let _permit = permit;
            work()
        })
        .await
    }

    /// Whether requests can be served.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        const PATIENCE: Duration = Duration::from_secs(2);
        let shared = self.shared.clone();
        match block(Instant::now() + PATIENCE, move || shared.is_migrated()).await {
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

/// Runs `work` on one of the worker's blocking threads. Work whose turn comes after the deadline isn't begun: while the
/// database is frozen, nothing piles up that nobody waits for any more.
async fn block<T: Send + 'static>(deadline: Instant, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let blocking = web::block(move || (Instant::now() < deadline).then(work));
    match before(deadline, blocking).await? {
        Ok(Some(done)) => Ok(done),
        Ok(None) => Err(Error::TimedOut),
        // It panicked, and the panic's message is in the log already.
        Err(error) => Err(Error::Internal(error.into())),
    }
}
