use crate::servers::variable;
use crate::sql;
use settings::Secret;
use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
};
use storage::{Database, PgConnection, Settings, admin, migrations};
use url::Url;
use uuid::Uuid;

/// A migrated, empty database of its own, dropped with the value.
pub struct TestDatabase {
    name: String,
    /// Of the server.
    admin: Settings,
    settings: Settings,
    database: Database,
}

/// Key of the advisory lock under which the template is made.
const TEMPLATE_LOCK: i64 = -2;

impl TestDatabase {
    /// A copy of a template that is migrated once for each state of the migrations.
    ///
    /// # Panics
    /// When the server isn't there.
    #[expect(clippy::new_without_default, reason = "making a database is no default")]
    pub fn new() -> Self {
        Self::on(&variable("DATABASE_URL"))
    }

    /// The same on the server of this URL.
    ///
    /// # Panics
    /// When it isn't there.
    pub fn on(url: &str) -> Self {
        let settings = |database: Option<&str>| settings_for(url, database);
        let name = format!("test_{}", Uuid::new_v4().simple());
        let admin = Database::open(&settings(None), "test-support").expect("a usable URL");
        let mut conn = admin.connection().expect("Postgres answers: run `make servers` first");
        let template = format!("template_{:016x}", migrations_digest());
        admin::alone(&mut conn, TEMPLATE_LOCK, |conn| {
            if !admin::has_database(conn, &template)? {
                // Under another name until it's complete.
                let fresh = format!("{template}_fresh");
                admin::drop_database(conn, &fresh)?;
                admin::create_database(conn, &fresh, None)?;
                let database = Database::open(&settings(Some(&fresh)), "test-support").expect("a usable URL");
                migrations::run(&mut *database.connection()?)?;
                drop(database);
                admin::create_database(conn, &template, Some(&fresh)).or_else(|_| {
                    // The pool's threads may take a moment to let go of the last connection.
                    sql::execute(
                        conn,
                        &format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{fresh}'"),
                    )?;
                    admin::create_database(conn, &template, Some(&fresh))
                })?;
                admin::drop_database(conn, &fresh)?;
            }
            admin::create_database(conn, &name, Some(&template))
        })
        .expect("a database for the test");
        let (admin, settings) = (settings(None), settings(Some(&name)));
        let database = Database::open(&settings, "test").expect("a usable URL");
        Self { name, admin, settings, database }
    }

    /// A database that isn't there.
    pub fn unreachable() -> Database {
        let settings =
            Settings { connect_timeout_ms: 100, ..settings_for("postgres://nobody@127.0.0.1:1/nowhere", None) };
        Database::open(&settings, "test").expect("a usable URL")
    }

    /// The section `[database]` for this database.
    pub fn settings(&self) -> Settings {
        self.settings.clone()
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        self.settings.url.expose()
    }

    /// A pool of connections to it.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The one number that a query returns under the name `n`.
    ///
    /// # Panics
    /// When the query fails.
    pub fn count(&self, sql: &str) -> i64 {
        self.ask(|conn| sql::count(conn, sql))
    }

    /// What a query returns.
    pub(crate) fn ask<T>(&self, query: impl Fn(&mut PgConnection) -> storage::Result<T>) -> T {
        let ask = || query(&mut *self.database.connection()?);
        // A connection from before a restart of the server says so when it's used; all others prove themselves then.
        let again = |error| if matches!(error, storage::Error::Unavailable(_)) { ask() } else { Err(error) };
        ask().or_else(again).expect("the query runs")
    }

    /// Runs SQL as it stands, and returns how many rows it touched.
    ///
    /// # Panics
    /// When it fails.
    pub fn execute(&self, sql: &str) -> usize {
        let mut conn = self.database.connection().expect("a connection");
        sql::execute(&mut conn, sql).expect("the statement runs")
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let dropped =
            Database::open(&self.admin, "test-support").map_err(|error| error.to_string()).and_then(|admin| {
                let mut conn = admin.connection().map_err(|error| error.to_string())?;
                admin::drop_database(&mut conn, &self.name).map_err(|error| error.to_string())
            });
        if let Err(error) = dropped {
            eprintln!("the test's database {} stays behind: {error}", self.name);
        }
    }
}

fn settings_for(server: &str, database: Option<&str>) -> Settings {
    let mut url = Url::parse(server).expect("a URL");
    if let Some(name) = database {
        url.set_path(name);
    }
    Settings {
        url: Secret::from(url.to_string()),
        schema: "public".into(),
        pool_size: 4,
        connect_timeout_ms: 10_000,
        statement_timeout_ms: 60_000,
        lock_timeout_ms: 60_000,
        call_timeout_ms: 60_000,
    }
}

/// Changes whenever a migration does.
fn migrations_digest() -> u64 {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations");
    let mut files: Vec<PathBuf> = fs::read_dir(root)
        .expect("the folder of migrations")
        .map(|entry| entry.expect("an entry of the folder").path().join("up.sql"))
        .collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(&file).expect("a migration").hash(&mut hasher);
    }
    hasher.finish()
}
