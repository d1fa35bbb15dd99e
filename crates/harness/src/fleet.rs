//! A fleet of real processes of its own, for benchmarks and for tests that kill and freeze them.

use crate::{Processes, private::reserve_port};
use std::{
    fmt, iter,
    net::UdpSocket,
    ops::{Deref, DerefMut},
    path::Path,
    time::Duration,
};

/// Which process of a fleet: the service's name and a number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(pub &'static str, pub u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

/// Every service of the fleet, in the order in which they're started.
pub fn services() -> impl Iterator<Item = &'static str> {
    include_str!("../../../deploy/services").lines().filter(|line| !line.starts_with('#'))
}

/// Processes of the services, with a gateway at a port of its own.
pub struct Fleet {
    processes: Processes<Name>,
    /// Variables of single services.
    own: Vec<(String, String, String)>,
    gateway_port: u16,
    _reserved: UdpSocket,
}

impl Deref for Fleet {
    type Target = Processes<Name>;

    fn deref(&self) -> &Processes<Name> {
        &self.processes
    }
}

impl DerefMut for Fleet {
    fn deref_mut(&mut self) -> &mut Processes<Name> {
        &mut self.processes
    }
}

impl Fleet {
    /// No process yet. Their logs go to a folder, a file each.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn new(database_url: &str, amqp_url: &str, logs: &Path) -> anyhow::Result<Self> {
        let mut processes = Processes::new(logs)?;
        let (gateway_port, reserved) = reserve_port();
        processes.set("MURMURATION__DATABASE__URL", database_url);
        processes.set("MURMURATION__BROKER__URL", amqp_url);
        processes.set("MURMURATION__API_GATEWAY__PORT", &gateway_port.to_string());
        Ok(Self { processes, own: Vec::new(), gateway_port, _reserved: reserved })
    }

    /// The gateway's address.
    pub fn gateway_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.gateway_port)
    }

    /// A variable for the processes of one service that are started from now on.
    pub fn set_for(&mut self, service: &str, variable: &str, value: &str) {
        self.own.push((service.into(), variable.into(), value.into()));
    }

    /// Starts one more process of a service.
    ///
    /// # Errors
    /// When its binary isn't there.
    pub fn start(&mut self, service: &'static str, settings: &[(&str, &str)]) -> anyhow::Result<Name> {
        let numbers = self.names().into_iter().filter(|name| name.0 == service).map(|name| name.1 + 1);
        let name = Name(service, numbers.chain(iter::once(0)).max().unwrap_or(0));
        let own = self.own.iter().filter(|(of, ..)| of == service);
        let own = own.map(|(_, variable, value)| (variable.as_str(), value.as_str()));
        let variables: Vec<_> = own.chain(settings.iter().copied()).collect();
        self.processes.start(name.clone(), service, Vec::new(), &variables)?;
        Ok(name)
    }

    /// Starts one process of each service.
    ///
    /// # Errors
    /// When a binary isn't there.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        services().try_for_each(|service| self.start(service, &[]).map(drop))
    }

    /// Stops every process of a service.
    ///
    /// # Errors
    /// When one doesn't stop in time.
    pub fn stop_service(&mut self, service: &str) -> anyhow::Result<()> {
        let names: Vec<Name> = self.names().into_iter().filter(|name| name.0 == service).collect();
        names.iter().try_for_each(|name| self.stop(name, Duration::from_secs(30)).map(drop))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for error in self.stop_all(Duration::from_secs(10)) {
            log::warn!("{error:#}");
        }
    }
}
