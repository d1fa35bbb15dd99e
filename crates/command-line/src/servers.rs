//! Where the servers are.

use anyhow::Context as _;
use clap::Args;
use serde::{Deserialize, de::DeserializeOwned};
use settings::{Problem, Secret};
use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Servers")]
pub struct Connections {
    /// Where Postgres is: postgres://user:password@host:port/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true, value_name = "URL")]
    database_url: Option<Secret>,
    /// Where RabbitMQ is: amqp://user:password@host:port/vhost
    #[arg(long, env = "AMQP_URL", hide_env_values = true, global = true, value_name = "URL")]
    amqp_url: Option<Secret>,
}

/// The variable that tells a service where Postgres is.
pub const DATABASE_URL: &str = "MURMURATION__DATABASE__URL";
/// The variable that tells a service where RabbitMQ is.
pub const AMQP_URL: &str = "MURMURATION__BROKER__URL";

#[derive(Deserialize)]
struct DatabaseSection {
    #[serde(rename = "database")]
    _database: Addressed,
}

#[derive(Deserialize)]
struct BrokerSection {
    #[serde(rename = "broker")]
    _broker: Addressed,
}

#[derive(Deserialize)]
struct Addressed {
    #[serde(rename = "url")]
    _url: Secret,
}

/// The settings as a tool finds them: what was said on the command line, else the services' own, else a checkout's local
/// servers.
pub struct Servers {
    program: &'static str,
    /// What settings are loaded with; the last of a name counts.
    variables: Vec<(OsString, OsString)>,
    /// What the checkout's `.local/env` says, if it is in use.
    local: HashMap<String, String>,
}

impl Servers {
    /// Those of a program of this name.
    ///
    /// # Errors
    /// When there is a `.local/env` that can't be read.
    pub fn find(program: &'static str, connections: &Connections) -> anyhow::Result<Self> {
        let mut variables: Vec<_> = env::vars_os().collect();
        for (name, url) in [(DATABASE_URL, &connections.database_url), (AMQP_URL, &connections.amqp_url)] {
            if let Some(url) = url.as_ref().filter(|url| !url.expose().is_empty()) {
                variables.push((name.into(), url.expose().into()));
            }
        }
        let mut servers = Self { program, variables, local: HashMap::new() };
        // Only if neither server is named: never one of theirs and one of the checkout's.
        if servers.lacks::<DatabaseSection>()
            && servers.lacks::<BrokerSection>()
            && let Some(path) = local_env(&env::current_dir().context("can't determine the current directory")?)
        {
            let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
            log::debug!("using the servers of {}", path.display());
            let lines = text.lines().filter_map(|line| line.split_once('='));
            servers.local = lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            for name in [DATABASE_URL, AMQP_URL] {
                servers.variables.extend(servers.local.get(name).map(|url| (name.into(), url.into())));
            }
        }
        Ok(servers)
    }

    /// The settings.
    ///
    /// # Errors
    /// Those of [`settings::load_from`].
    pub fn settings<T: DeserializeOwned>(&self) -> Result<T, settings::Error> {
        settings::load_from(self.program, self.variables.iter().cloned())
    }

    /// The settings, if they say where the servers are that they tell of.
    ///
    /// # Errors
    /// As for [`Servers::settings`], but for [`Problem::Missing`].
    pub fn settings_if_set<T: DeserializeOwned>(&self) -> Result<Option<T>, settings::Error> {
        match self.settings() {
            Err(settings::Error { problem: Problem::Missing { .. }, .. }) => Ok(None),
            settings => settings.map(Some),
        }
    }

    fn lacks<T: DeserializeOwned>(&self) -> bool {
        matches!(self.settings_if_set::<T>(), Ok(None))
    }

    /// A variable of the checkout's `.local/env`, if that is in use.
    pub fn local(&self, name: &str) -> Option<&str> {
        self.local.get(name).map(String::as_str)
    }
}

/// `.local/env` in `folder` or the nearest one above it.
fn local_env(folder: &Path) -> Option<PathBuf> {
    folder.ancestors().map(|folder| folder.join(".local/env")).find(|path| path.is_file())
}
