//! Where the servers are, and the settings of what runs on them.

use crate::tables;
use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Deserialize;
use settings::{Problem, Secret};
use std::{env, ffi::OsString, fs};
use storage::{Database, migrations};
use worker::HealthSettings;

const DATABASE_URL: &str = "MURMURATION__DATABASE__URL";
const AMQP_URL: &str = "MURMURATION__BROKER__URL";

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
        let mut variables: Vec<(OsString, OsString)> = env::vars_os().collect();
        for (name, url) in [(DATABASE_URL, &connections.database_url), (AMQP_URL, &connections.amqp_url)] {
            if let Some(url) = url.as_ref().filter(|url| !url.expose().is_empty()) {
                variables.push((name.into(), url.expose().into()));
            }
        }
        let load = |variables: &[(OsString, OsString)]| settings::load_from(crate::SERVICE, variables.iter().cloned());
        match load(&variables) {
            Err(settings::Error { problem: Problem::Missing { .. }, .. }) => {}
            settings => return Ok(settings?),
        }
        let folder = env::current_dir().context("can't tell the current folder")?;
        if let Some(path) = folder.ancestors().map(|folder| folder.join(".local/env")).find(|path| path.is_file()) {
            let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
            let known = |name: &str| variables.iter().any(|(other, value)| other == name && !value.is_empty());
            let lines = text.lines().filter_map(|line| line.split_once('='));
            let missing: Vec<_> = lines
                .filter(|(name, _)| [DATABASE_URL, AMQP_URL].contains(name) && !known(name))
                .map(|(name, value)| (name.into(), value.into()))
                .collect();
            variables.extend(missing);
        }
        Ok(load(&variables)?)
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
