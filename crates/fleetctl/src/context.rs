//! Where the servers are, and connections to them.

use anyhow::Context as _;
use clap::Args;
use domain::topology::{Retention, Topology};
use serde::{Deserialize, de::DeserializeOwned};
use settings::{Problem, Secret};
use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};
use storage::Database;

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Servers")]
pub(crate) struct Connections {
    /// Where Postgres is: postgres://user:password@host:port/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true, value_name = "URL")]
    database_url: Option<Secret>,
    /// Where RabbitMQ is: amqp://user:password@host:port/vhost
    #[arg(long, env = "AMQP_URL", hide_env_values = true, global = true, value_name = "URL")]
    amqp_url: Option<Secret>,
}

const DATABASE_URL: &str = "MURMURATION__DATABASE__URL";
const AMQP_URL: &str = "MURMURATION__BROKER__URL";

/// How long a statement may take that goes over whole tables.
const LONG_STATEMENT_MS: u64 = 600_000;

#[derive(Deserialize)]
struct DatabaseSection {
    database: storage::Settings,
}

#[derive(Deserialize)]
struct BrokerSection {
    broker: broker::Settings,
}

#[derive(Deserialize)]
struct WorkerSection {
    worker: worker::Settings,
}

#[derive(Deserialize)]
struct MessageLogSection {
    message_log: Retention,
}

#[derive(Deserialize)]
struct MessageRecorderSection {
    message_recorder: Recorder,
}

/// Of the recorder's settings, what commands need.
#[derive(Deserialize)]
struct Recorder {
    batch: usize,
    lease_ttl_ms: i64,
}

/// What commands work with.
pub(crate) struct Context {
    /// What settings are loaded with; the last of a name counts.
    variables: Vec<(OsString, OsString)>,
    /// What the checkout's `.local/env` says, if it is in use.
    local: HashMap<String, String>,
}

impl Context {
    /// # Errors
    /// When there is a `.local/env` that can't be read.
    pub(crate) fn new(connections: &Connections) -> anyhow::Result<Self> {
        let mut variables: Vec<_> = env::vars_os().collect();
        for (name, url) in [(DATABASE_URL, &connections.database_url), (AMQP_URL, &connections.amqp_url)] {
            if let Some(url) = url.as_ref().filter(|url| !url.expose().is_empty()) {
                variables.push((name.into(), url.expose().into()));
            }
        }
        let mut context = Self { variables, local: HashMap::new() };
        // Only if neither server is named: never one of theirs and one of the checkout's.
        if context.lacks::<DatabaseSection>()
            && context.lacks::<BrokerSection>()
            && let Some(path) = local_env(&env::current_dir().context("can't tell the current folder")?)
        {
            let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
            log::debug!("the servers are those of {}", path.display());
            let lines = text.lines().filter_map(|line| line.split_once('='));
            context.local = lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            for name in [DATABASE_URL, AMQP_URL] {
                context.variables.extend(context.local.get(name).map(|url| (name.into(), url.into())));
            }
        }
        Ok(context)
    }

    /// The settings, with what was said on the command line.
    pub(crate) fn settings<T: DeserializeOwned>(&self) -> Result<T, settings::Error> {
        settings::load_from("fleetctl", self.variables.iter().cloned())
    }

    fn lacks<T: DeserializeOwned>(&self) -> bool {
        matches!(self.settings::<T>(), Err(settings::Error { problem: Problem::Missing { .. }, .. }))
    }

    /// The shared schema, with the services' own time limits.
    pub(crate) fn database(&self) -> anyhow::Result<Database> {
        self.database_with(|_| {})
    }

    /// The shared schema, for statements that go over whole tables.
    pub(crate) fn patient_database(&self) -> anyhow::Result<Database> {
        self.database_with(|settings| {
            settings.statement_timeout_ms = LONG_STATEMENT_MS;
            settings.call_timeout_ms = LONG_STATEMENT_MS + LONG_STATEMENT_MS / 10;
        })
    }

    /// Where the shared schema is.
    pub(crate) fn database_settings(&self) -> anyhow::Result<storage::Settings> {
        Ok(self.settings::<DatabaseSection>()?.database)
    }

    /// The shared schema, with settings adjusted.
    pub(crate) fn database_with(&self, adjust: impl FnOnce(&mut storage::Settings)) -> anyhow::Result<Database> {
        let mut settings = self.database_settings()?;
        adjust(&mut settings);
        Ok(Database::open(&settings, "fleetctl")?)
    }

    /// Where the broker is; `None` if nothing says so.
    pub(crate) fn broker_if_set(&self) -> anyhow::Result<Option<broker::Settings>> {
        match self.settings::<BrokerSection>() {
            Ok(section) => Ok(Some(section.broker)),
            Err(settings::Error { problem: Problem::Missing { .. }, .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Where the broker is.
    pub(crate) fn broker(&self) -> anyhow::Result<broker::Settings> {
        Ok(self.settings::<BrokerSection>()?.broker)
    }

    /// The fleet's exchanges, queues and bindings.
    pub(crate) fn topology(&self) -> anyhow::Result<Topology> {
        Ok(Topology::fleet(&self.settings::<WorkerSection>()?.worker.retry_delays()))
    }

    /// What the streams of the message log are declared with.
    pub(crate) fn retention(&self) -> anyhow::Result<Retention> {
        Ok(self.settings::<MessageLogSection>()?.message_log)
    }

    /// How long ago a member of a consumer group may have been seen if it runs: others have taken its partitions over after
    /// half of that.
    pub(crate) fn recorder_seen_within_ms(&self) -> anyhow::Result<i64> {
        Ok(2 * self.settings::<MessageRecorderSection>()?.message_recorder.lease_ttl_ms)
    }

    /// The most messages that a recorder records in one transaction.
    pub(crate) fn recorder_batch(&self) -> anyhow::Result<usize> {
        Ok(self.settings::<MessageRecorderSection>()?.message_recorder.batch)
    }

    /// Where the broker's management API is, if that's known.
    pub(crate) fn management<'a>(&'a self, given: Option<&'a str>) -> Option<&'a str> {
        given.filter(|url| !url.is_empty()).or(self.local.get("RABBITMQ_MANAGEMENT_URL").map(String::as_str))
    }

    /// Where the gateway is, without a slash at the end.
    pub(crate) fn gateway<'a>(&'a self, given: Option<&'a str>) -> &'a str {
        let url = given.filter(|url| !url.is_empty()).or(self.local.get("GATEWAY_URL").map(String::as_str));
        url.unwrap_or("http://127.0.0.1:7777").trim_end_matches('/')
    }
}

/// `.local/env` in `folder` or the nearest one above it.
fn local_env(folder: &Path) -> Option<PathBuf> {
    folder.ancestors().map(|folder| folder.join(".local/env")).find(|path| path.is_file())
}
