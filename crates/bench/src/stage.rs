//! A database, a vhost and a fleet of processes for one benchmark.

use crate::{PROGRAM, Place, context::Context};
use anyhow::{Context as _, ensure};
use harness::{Fleet, binaries, services};
use management::Management;
use settings::Secret;
use std::{
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use storage::{Connection, Database, admin, migrations};
use url::Url;

const NAME: &str = "murmuration_bench";

/// Longer than any run takes on the slowest of machines.
const LIMIT: Duration = Duration::from_secs(600);

/// Set up by [`Stage::new`], taken down when dropped.
pub(super) struct Stage {
    pub database: Database,
    pub broker: broker::Settings,
    pub url: Secret,
    pub fleet: Fleet,
    admin: storage::Settings,
    management: Management,
    keep: bool,
}

impl Stage {
    /// An empty, migrated database and an empty vhost; no process yet. What an interrupted run has left is removed.
    pub(super) fn new(place: &Place, context: &Context) -> anyhow::Result<Self> {
        let broker = context.settings.broker.clone();
        let mut admin = context.settings.database.clone();
        // Filling takes minutes, and a benchmark is no place for a retry.
        admin.statement_timeout_ms = 0;
        admin.lock_timeout_ms = 0;
        admin.call_timeout_ms = 3_600_000;
        admin.pool_size = 12;
        let at = |url: &Secret| -> anyhow::Result<Secret> {
            let mut url = Url::parse(url.expose()).context("a server's URL can't be read")?;
            url.set_path(NAME);
            Ok(Secret::from(url.to_string()))
        };
        let own = storage::Settings { url: at(&admin.url)?, ..admin.clone() };
        let broker = broker::Settings { url: at(&broker.url)?, ..broker };
        let management = context.management(place.management_url.as_deref());
        let management = management.context("where is RabbitMQ's management API? Set RABBITMQ_MANAGEMENT_URL")?;
        let management = Management::new(management)?;
        // Fails where there was none.
        let _ = management.delete_vhost(NAME);
        management.create_vhost(NAME)?;
        let mut conn = Database::open(&admin, PROGRAM)?.connection()?;
        admin::drop_database(&mut conn, NAME)?;
        admin::create_database(&mut conn, NAME, None)?;
        let database = Database::open(&own, PROGRAM)?;
        migrations::run(&mut *database.connection()?)?;
        let mut fleet = Fleet::new(own.url.expose(), broker.url.expose(), &place.out.join("logs"))?;
        fleet.set("MURMURATION__TELEMETRY__LOG", "warn");
        Ok(Self { database, broker, url: own.url, fleet, admin, management, keep: place.keep })
    }

    /// A connection for filling and looking.
    pub(super) fn connection(&self) -> anyhow::Result<Connection> {
        Ok(self.database.connection()?)
    }

    /// Starts one process of each service, with these settings for the workers.
    pub(super) fn start(&mut self, workers: &[(&str, &str)]) -> anyhow::Result<()> {
        for service in ["api-gateway", "outbox-relay"] {
            self.fleet.start(service, &[])?;
        }
        // These have nothing to do with tweets.
        let others = ["api-gateway", "outbox-relay", "event-processor", "message-recorder"];
        for service in services().filter(|service| !others.contains(service)) {
            self.fleet.start(service, workers)?;
        }
        self.fleet.wait_ready(Duration::from_secs(60))
    }

    /// Starts the operator's tool, on the benchmark's servers.
    pub(super) fn fleetctl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Child> {
        Command::new(binaries()?.join("fleetctl"))
            .args(args)
            .env("DATABASE_URL", self.url.expose())
            .env("AMQP_URL", self.broker.url.expose())
            .env("GATEWAY_URL", self.fleet.gateway_url())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("can't start fleetctl")
    }

    /// Stops every process.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        for name in self.fleet.names() {
            self.fleet.stop(&name, Duration::from_secs(30))?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("{error:#}");
        }
        if self.keep {
            return;
        }
        if let Err(error) = self.management.delete_vhost(NAME) {
            log::warn!("the vhost {NAME} stays behind: {error}");
        }
        let dropped = Database::open(&self.admin, PROGRAM)
            .map_err(anyhow::Error::from)
            .and_then(|admin| Ok(admin::drop_database(&mut *admin.connection()?, NAME)?));
        if let Err(error) = dropped {
            log::warn!("the database {NAME} stays behind: {error:#}");
        }
    }
}

/// Waits until it's done, looking every now and then.
pub(super) fn until(mut done: impl FnMut() -> anyhow::Result<bool>, otherwise: &str) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    while !done()? {
        ensure!(Instant::now() < end, "{otherwise} after {LIMIT:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until a program has ended that must succeed.
pub(super) fn finish(child: Child, what: &str) -> anyhow::Result<()> {
    let output = child.wait_with_output().with_context(|| format!("can't look after {what}"))?;
    let [said, error] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).trim().to_owned());
    ensure!(output.status.success(), "{what} failed: {said}\n{error}");
    Ok(())
}
