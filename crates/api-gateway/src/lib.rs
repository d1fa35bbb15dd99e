#![doc = include_str!("../README.md")]

mod access;
mod avatars;
mod body;
mod clients;
mod connections;
mod error;
mod events;
mod feeds;
mod fields;
mod gateway;
mod health;
mod imports;
mod messages;
mod origin;
mod results;
mod routes;
mod server;
mod settings;
mod shares;
mod subscriptions;
mod threads;
mod tweets;
mod users;

pub use crate::settings::{HttpSettings, Settings};

use crate::gateway::Shared;
use actix_web::{dev::Server, rt};
use anyhow::Context as _;
use process::Program;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;
use std::{
    net::{SocketAddr, TcpListener},
    thread,
};
use storage::Database;

/// The service's name.
const SERVICE: &str = "api-gateway";

/// The service as a program.
pub const PROGRAM: Program = Program {
    health,
    ..Program::new(
        SERVICE,
        "Answers the fleet's HTTP: users, subscriptions, tweets, feeds, follower imports, account events, the message log.",
        run,
    )
};

/// Where it answers health checks: with everything else.
fn health(service: &str) -> anyhow::Result<SocketAddr> {
    #[derive(Deserialize)]
    struct Sections {
        api_gateway: HttpSettings,
    }
    let Sections { api_gateway } = ::settings::load(service)?;
    Ok(SocketAddr::new(api_gateway.address, api_gateway.port))
}

/// Answers HTTP until SIGTERM, then finishes the requests in hand.
///
/// # Errors
/// When the settings can't be used or the port can't be listened on. A database that is away is no error.
pub fn run() -> anyhow::Result<()> {
    let (settings, _telemetry) = process::begin::<Settings>(SERVICE)?;
    let (address, port) = (settings.api_gateway.address, settings.api_gateway.port);
    allow_open_files(settings.api_gateway.connections + settings.api_gateway.blocking_threads);
    let listener = TcpListener::bind((address, port)).with_context(|| format!("can't listen on {address}:{port}"))?;
    rt::System::new().block_on(async { serve(listener, settings)?.await.context("can't answer HTTP") })?;
    log::info!("stopped");
    Ok(())
}

/// Lets the process have so many connections, as far as the system does: usually 1,024 files are open at most until it asks for more.
fn allow_open_files(connections: usize) {
    /// What else is open.
    const OTHERS: u64 = 64;
    let wanted = connections as u64 + OTHERS;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return;
    }
    let allowed = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), maximum: limit.maximum });
    if raised.is_err() || allowed < wanted {
        log::warn!(wanted, allowed; "fewer files may be open than api_gateway.connections needs");
    }
}

/// A server that answers on `listener`. To be called within an actix system.
///
/// # Errors
/// When the settings can't be used.
pub fn serve(listener: TcpListener, settings: Settings) -> anyhow::Result<Server> {
    let http = settings.api_gateway;
    http.check()?;
    let pool_size = u32::try_from(http.blocking_threads).context("api_gateway.blocking_threads is too large")?;
    let database = Database::open(&storage::Settings { pool_size, ..settings.database }, SERVICE)?;
    let shared = Shared::new(database, &http);
    let address = listener.local_addr().context("can't tell the port")?;
    let first_look = shared.clone();
    let server = server::start(listener, http, shared).context("can't listen")?;
    log::info!(address:% = address; "listening");
    // On a thread of its own, which a stopping gateway needn't wait for.
    thread::spawn(move || match first_look.is_migrated() {
        Ok(true) => log::info!("ready"),
        Ok(false) => log::warn!("not ready: the database lacks migrations"),
        Err(error) => log::warn!("not ready: {error}"),
    });
    Ok(server)
}
