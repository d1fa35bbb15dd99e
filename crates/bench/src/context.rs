//! Where the servers are, and what of the settings a benchmark needs.

use command_line::servers::{Connections, Servers};
use serde::Deserialize;

/// The sections that a benchmark reads.
#[derive(Deserialize)]
pub(crate) struct Settings {
    pub(crate) database: storage::Settings,
    pub(crate) broker: broker::Settings,
    pub(crate) api_gateway: Gateway,
    pub(crate) message_recorder: Recorder,
}

/// Of the gateway's settings, how many connections to the database it has.
#[derive(Deserialize)]
pub(crate) struct Gateway {
    pub(crate) blocking_threads: usize,
}

/// Of the recorder's settings, the most messages that it records in one transaction.
#[derive(Deserialize)]
pub(crate) struct Recorder {
    pub(crate) batch: usize,
}

pub(crate) struct Context {
    servers: Servers,
    pub(crate) settings: Settings,
}

impl Context {
    pub(crate) fn new(connections: &Connections) -> anyhow::Result<Self> {
        let servers = Servers::find(crate::PROGRAM, connections)?;
        Ok(Self { settings: servers.settings()?, servers })
    }

    /// Where the broker's management API is, if that's known.
    pub(crate) fn management<'a>(&'a self, given: Option<&'a str>) -> Option<&'a str> {
        given.filter(|url| !url.is_empty()).or(self.servers.local("RABBITMQ_MANAGEMENT_URL"))
    }
}
