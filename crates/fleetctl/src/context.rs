//! Where the servers are, and connections to them.

use command_line::servers::{Connections, Servers};
use domain::topology::{Retention, Topology};
use serde::{Deserialize, de::DeserializeOwned};
use std::time::Duration;
use storage::Database;

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
    lease_ttl_ms: i64,
}

#[derive(Deserialize)]
struct SequencedSection {
    sequenced: Sequenced,
}

/// Of the settings of sequenced streams, what commands need.
#[derive(Deserialize)]
struct Sequenced {
    lease_ttl_ms: u64,
}

/// What commands work with.
pub(crate) struct Context(Servers);

impl Context {
    /// # Errors
    /// When there is a `.local/env` that can't be read.
    pub(crate) fn new(connections: &Connections) -> anyhow::Result<Self> {
        Ok(Self(Servers::find("fleetctl", connections)?))
    }

    /// The settings, with what was said on the command line.
    pub(crate) fn settings<T: DeserializeOwned>(&self) -> Result<T, settings::Error> {
        self.0.settings()
    }

    /// The shared schema, with the services' own time limits.
    pub(crate) fn database(&self) -> anyhow::Result<Database> {
        self.database_with(|_| {})
    }

    /// The shared schema, for statements that go over whole tables.
    pub(crate) fn patient_database(&self) -> anyhow::Result<Database> {
        self.database_with(|settings| {
            settings.statement_timeout_ms = LONG_STATEMENT_MS;
            settings.lock_timeout_ms = LONG_STATEMENT_MS;
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
        Ok(self.0.settings_if_set::<BrokerSection>()?.map(|section| section.broker))
    }

    /// Where the broker is.
    pub(crate) fn broker(&self) -> anyhow::Result<broker::Settings> {
        Ok(self.settings::<BrokerSection>()?.broker)
    }

    /// The fleet's exchanges, queues and bindings.
    pub(crate) fn topology(&self) -> anyhow::Result<Topology> {
        Ok(Topology::fleet(&self.retry_delays()?))
    }

    /// How long failed messages wait.
    pub(crate) fn retry_delays(&self) -> anyhow::Result<Vec<Duration>> {
        Ok(self.settings::<WorkerSection>()?.worker.retry_delays())
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

    /// How long the leases on a stream's shards run.
    pub(crate) fn sequenced_lease_ttl(&self) -> anyhow::Result<Duration> {
        Ok(Duration::from_millis(self.settings::<SequencedSection>()?.sequenced.lease_ttl_ms))
    }

    /// Where the broker's management API is, if that's known.
    pub(crate) fn management<'a>(&'a self, given: Option<&'a str>) -> Option<&'a str> {
        given.filter(|url| !url.is_empty()).or(self.0.local("RABBITMQ_MANAGEMENT_URL"))
    }

    /// Where the gateway is, without a slash at the end.
    pub(crate) fn gateway<'a>(&'a self, given: Option<&'a str>) -> &'a str {
        let url = given.filter(|url| !url.is_empty()).or(self.0.local("GATEWAY_URL"));
        url.unwrap_or("http://127.0.0.1:7777").trim_end_matches('/')
    }
}
