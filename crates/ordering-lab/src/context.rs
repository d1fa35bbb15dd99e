//! Where the servers are, and the settings of what runs on them.

use crate::tables;
use anyhow::ensure;
use command_line::servers::{AMQP_URL, Connections, DATABASE_URL, Servers};
use process::HealthSettings;
use serde::Deserialize;
use storage::{Database, migrations};

/// The settings that the lab and its consumers need.
#[derive(Clone, Deserialize)]
pub(crate) struct Settings {
    pub(crate) database: storage::Settings,
    pub(crate) broker: broker::Settings,
    pub(crate) worker: worker::Settings,
    pub(crate) health: HealthSettings,
    pub(crate) telemetry: telemetry::Settings,
    pub(crate) sequenced: sequenced::Settings,
}

impl Settings {
    /// What was said on the command line, else the services' own settings, else a checkout's local servers.
    pub(crate) fn load(connections: &Connections) -> anyhow::Result<Self> {
        Ok(Servers::find(crate::SERVICE, connections)?.settings()?)
    }

    /// The database, with the schema that this program knows and the lab's own tables.
    pub(crate) fn database(&self) -> anyhow::Result<Database> {
        let database = Database::open(&self.database, crate::SERVICE)?;
        let mut conn = database.connection()?;
        ensure!(!migrations::are_pending(&mut conn)?, "the database lacks migrations: run `fleetctl migrate`");
        tables::make(&mut conn)?;
        drop(conn);
        Ok(database)
    }

    /// Where the servers are, for a process that loads its settings by itself.
    pub(crate) fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            (DATABASE_URL, self.database.url.expose().to_owned()),
            (AMQP_URL, self.broker.url.expose().to_owned()),
            // Those of tools.
            ("DATABASE_URL", self.database.url.expose().to_owned()),
            ("AMQP_URL", self.broker.url.expose().to_owned()),
        ]
    }
}
