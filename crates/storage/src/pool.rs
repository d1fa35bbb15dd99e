//! The connection pool: bounded in every wait.

use crate::{Error, Result, error::is_lost, session::Expected, socket::Before};
use diesel::{
    Connection as _, PgConnection, RunQueryDsl,
    connection::{AnsiTransactionManager, InstrumentationEvent, TransactionManager as _},
    sql_query,
    sql_types::Text,
};
use domain::Failure;
use serde::Deserialize;
use settings::Secret;
use std::{
    net::{Shutdown, TcpStream},
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The section `[database]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where it is: `postgres://user:password@host:port/database`.
    pub url: Secret,
    /// The schema that holds the tables.
    pub schema: String,
    /// Connections at most.
    pub pool_size: u32,
    /// How long connecting, or waiting for a free connection, may take.
    pub connect_timeout_ms: u64,
    /// After how long the server gives up a statement; 0 for never.
    pub statement_timeout_ms: u64,
    /// After how long of waiting for a lock the server gives up a statement; 0 for never.
    pub lock_timeout_ms: u64,
    /// After how long without any answer a call is given up and its socket closed.
    pub call_timeout_ms: u64,
}

/// The time since this process's first use of the clock, never 0.
fn now_ms() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed().as_millis();
    u64::try_from(elapsed).unwrap_or(u64::MAX) + 1
}

/// What the watchdog knows of a connection.
struct Line {
    /// `None` where libpq's socket couldn't be found: then the call isn't bounded.
    socket: Option<TcpStream>,
    /// When the call under way is given up, by [`now_ms`]; 0 while there is none.
    deadline_ms: AtomicU64,
    /// When the last call ended.
    last_answer_ms: AtomicU64,
}

/// Shuts the sockets of calls that are overdue.
fn watch(lines: &Mutex<Vec<Weak<Line>>>) {
    let now = now_ms();
    lines.lock().unwrap_or_else(PoisonError::into_inner).retain(|line| {
        let Some(line) = line.upgrade() else { return false };
        let deadline = line.deadline_ms.load(Ordering::Acquire);
        if deadline != 0 && deadline < now {
            log::warn!("a database call got no answer in time; its connection is closed");
            line.deadline_ms.store(0, Ordering::Release);
            if let Some(socket) = &line.socket {
                // An error means that it's closed already.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        true
    });
}

/// A connection as the pool keeps it.
pub struct Held {
    conn: PgConnection,
    line: Arc<Line>,
    generation: u64,
}

impl Deref for Held {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.conn
    }
}

impl DerefMut for Held {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.conn
    }
}

/// A connection out of the pool; goes back when dropped.
pub type Connection = r2d2::PooledConnection<Manager>;

/// Opens and checks connections.
pub struct Manager {
    conninfo: String,
    port: u16,
    expected: Expected,
    call_timeout: Duration,
    lines: Arc<Mutex<Vec<Weak<Line>>>>,
    /// Goes up whenever a connection is found lost: those that are older prove themselves before they're used again.
    generation: Arc<AtomicU64>,
    connecting: Mutex<()>,
}

/// Why a connection couldn't be opened or is no good: r2d2 keeps of it what `Display` says, and no source. libpq's
/// texts name the server and never the password.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoConnection(String);

impl r2d2::ManageConnection for Manager {
    type Connection = Held;
    type Error = NoConnection;

    fn connect(&self) -> std::result::Result<Held, NoConnection> {
        let generation = self.generation.load(Ordering::Acquire);
        let (mut conn, socket) = {
            let _alone = self.connecting.lock().unwrap_or_else(PoisonError::into_inner);
            let before = Before::now();
            let conn = PgConnection::establish(&self.conninfo)
                .map_err(|error| NoConnection(error.to_string().trim().replace('\n', " ")))?;
            (conn, before.opened_since(self.port))
        };
        let line = Arc::new(Line { socket, deadline_ms: AtomicU64::new(0), last_answer_ms: AtomicU64::new(now_ms()) });
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&line));
        let (seen, current, timeout) = (line.clone(), self.generation.clone(), self.call_timeout);
        conn.set_instrumentation(move |event: InstrumentationEvent<'_>| match event {
            InstrumentationEvent::StartQuery { .. } => {
                let deadline = now_ms() + u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX / 2);
                seen.deadline_ms.store(deadline, Ordering::Release);
            }
            InstrumentationEvent::FinishQuery { error, .. } => {
                seen.deadline_ms.store(0, Ordering::Release);
                seen.last_answer_ms.store(now_ms(), Ordering::Release);
                if error.is_some_and(is_lost) {
                    current.fetch_add(1, Ordering::AcqRel);
                }
            }
            _ => {}
        });
        self.expected.arrange(&mut conn).map_err(NoConnection)?;
        Ok(Held { conn, line, generation })
    }

    /// A connection that has answered lately, and none has been lost since it was opened, needs no round trip.
    fn is_valid(&self, held: &mut Held) -> std::result::Result<(), NoConnection> {
        const FRESH_MS: u64 = 1000;
        let generation = self.generation.load(Ordering::Acquire);
        let idle = now_ms().saturating_sub(held.line.last_answer_ms.load(Ordering::Acquire));
        if held.generation == generation && idle < FRESH_MS {
            return Ok(());
        }
        sql_query("SELECT 1").execute(&mut held.conn).map_err(|error| NoConnection(error.to_string()))?;
        held.generation = generation;
        Ok(())
    }

    fn has_broken(&self, held: &mut Held) -> bool {
        thread::panicking() || AnsiTransactionManager::is_broken_transaction_manager(&mut held.conn)
    }
}

/// The shared schema, by way of a pool. Cheap to clone.
#[derive(Clone)]
pub struct Database {
    pool: r2d2::Pool<Manager>,
    generation: Arc<AtomicU64>,
}

/// Reported by the call that meets it; r2d2 would log the same again for every attempt.
#[derive(Debug)]
struct Quiet;

impl r2d2::HandleError<NoConnection> for Quiet {
    fn handle_error(&self, error: NoConnection) {
        log::debug!("no connection to the database: {error}");
    }
}

impl Database {
    /// A pool for the service of this name. Connects when needed: the database may be away.
    ///
    /// # Errors
    /// When the settings can't be used.
    pub fn open(settings: &Settings, service: &str) -> std::result::Result<Self, InvalidSettings> {
        let expected = Expected::new(settings);
        let (conninfo, port) = conninfo(settings, service, &expected.options())?;
        let lines = Arc::new(Mutex::new(Vec::new()));
        let watched = Arc::downgrade(&lines);
        thread::Builder::new()
            .name("database-watchdog".into())
            .spawn(move || {
                while let Some(lines) = watched.upgrade() {
                    watch(&lines);
                    drop(lines);
                    thread::sleep(Duration::from_millis(100));
                }
            })
            .map_err(|_| InvalidSettings("url: no thread can be started"))?;
        let generation = Arc::<AtomicU64>::default();
        let manager = Manager {
            conninfo,
            port,
            expected,
            call_timeout: Duration::from_millis(settings.call_timeout_ms),
            lines,
            generation: generation.clone(),
            connecting: Mutex::default(),
        };
        let pool = r2d2::Pool::builder()
            .max_size(settings.pool_size)
            .min_idle(Some(0))
            .connection_timeout(Duration::from_millis(settings.connect_timeout_ms))
            .max_lifetime(None)
            .error_handler(Box::new(Quiet))
            .build_unchecked(manager);
        Ok(Self { pool, generation })
    }

    /// The same with a single connection, for one whose work mustn't wait until others give theirs back.
    ///
    /// # Errors
    /// When the URL can't be read.
    pub fn open_alone(settings: &Settings, service: &str) -> std::result::Result<Self, InvalidSettings> {
        Self::open(&Settings { pool_size: 1, ..settings.clone() }, service)
    }

    /// A connection, not in a transaction.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when none can be had in time.
    pub fn connection(&self) -> Result<Connection> {
        self.pool.get().map_err(|error| Error::Unavailable(error.into()))
    }

    /// Runs `work` in one transaction: all of it takes place, or, upon an error, nothing. Repeats it where another transaction
    /// was first, so `work` must have no effects elsewhere.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Unavailable`]: then the commit may have taken place all the same.
    pub fn transaction<T>(&self, mut work: impl FnMut(&mut PgConnection) -> Result<T>) -> Result<T> {
        const ATTEMPTS: u32 = 5;
        let mut conn = self.connection()?;
        for attempt in 1.. {
            match conn.transaction(&mut work) {
                Err(Error::Contention(error)) if attempt < ATTEMPTS => {
                    log::debug!("transaction repeated: {error}");
                }
                result => return result,
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// The same for rows that others wait for: if this process freezes in between, the server ends the transaction once it
    /// has heard nothing for as long as `idle`.
    ///
    /// # Errors
    /// As for [`Database::transaction`].
    pub fn transaction_within<T>(
        &self,
        idle: Duration,
        mut work: impl FnMut(&mut PgConnection) -> Result<T>,
    ) -> Result<T> {
        self.transaction(|conn| {
            let idle = idle.as_millis().max(1);
            sql_query(format!("SET LOCAL idle_in_transaction_session_timeout = {idle}")).execute(conn)?;
            work(conn)
        })
    }

    /// The same, and no statement waits for longer than `wait` for what another session holds.
    ///
    /// # Errors
    /// As for [`Database::transaction`], and [`Error::Locked`].
    pub fn transaction_unheld<T>(
        &self,
        idle: Duration,
        wait: Duration,
        mut work: impl FnMut(&mut PgConnection) -> Result<T>,
    ) -> Result<T> {
        self.transaction(|conn| {
            // In one round trip.
            sql_query(
                "SELECT set_config('idle_in_transaction_session_timeout', $1, true), set_config('lock_timeout', $2, \
                 true)",
            )
            .bind::<Text, _>(idle.as_millis().max(1).to_string())
            .bind::<Text, _>(wait.as_millis().max(1).to_string())
            .execute(conn)?;
            work(conn)
        })
    }

    /// Another number whenever a connection has been found lost: behind the next one there may be another server. Within
    /// [`Database::transaction`], it's that of the transaction's connection or a later one.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it doesn't.
    pub fn ping(&self) -> Result<()> {
        sql_query("SELECT 1").execute(&mut **self.connection()?)?;
        Ok(())
    }

    /// [`Database::ping`] for those who know no database.
    pub fn probe(&self) -> Arc<dyn Fn() -> std::result::Result<(), Failure> + Send + Sync> {
        let database = self.clone();
        Arc::new(move || Ok(database.ping()?))
    }
}

/// The section `[database]` can't be used; says which key and why, and never repeats the URL.
#[derive(Debug, thiserror::Error)]
#[error("database.{0}")]
pub struct InvalidSettings(&'static str);

/// What libpq connects by, with our time limits, and the port.
fn conninfo(settings: &Settings, service: &str, options: &str) -> std::result::Result<(String, u16), InvalidSettings> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if settings.schema.is_empty() || !settings.schema.chars().all(plain) {
        return Err(InvalidSettings("schema: may hold small letters, digits and _ only"));
    }
    let url = settings.url.expose();
    let rest = url
        .strip_prefix("postgres://")
        .or_else(|| url.strip_prefix("postgresql://"))
        .ok_or(InvalidSettings("url: must start with postgres://"))?;
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let port = match host.rsplit_once(':') {
        Some((_, port)) if !port.ends_with(']') => {
            port.parse().map_err(|_| InvalidSettings("url: its port is no number"))?
        }
        _ => 5432,
    };
    // Whole seconds are all that libpq takes, and 1 is read as 2.
    let connect_s = settings.connect_timeout_ms.div_ceil(1000).max(2);
    let separator = if rest.contains('?') { '&' } else { '?' };
    let timeouts = format!(
        "connect_timeout={connect_s}&tcp_user_timeout={}&keepalives_idle=10&keepalives_interval=5&keepalives_count=3",
        settings.call_timeout_ms
    );
    Ok((format!("{url}{separator}{timeouts}&application_name={service}&options={options}"), port))
}
