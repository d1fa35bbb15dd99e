#![doc = include_str!("../README.md")]

mod access;
mod avatars;
mod body;
mod error;
mod events;
mod feeds;
mod fields;
mod gateway;
mod health;
mod imports;
mod messages;
mod results;
mod routes;
mod settings;
mod subscriptions;
mod tweets;
mod users;

pub use crate::settings::{HttpSettings, Settings};

use crate::gateway::{Gateway, Shared};
use actix_web::{App, HttpServer, dev::Server, middleware::from_fn, rt, web};
use anyhow::Context as _;
use process::Program;
use serde::Deserialize;
use std::{
    net::{SocketAddr, TcpListener},
    thread,
    time::Duration,
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
    let listener = TcpListener::bind((address, port)).with_context(|| format!("can't listen on {address}:{port}"))?;
    rt::System::new().block_on(async { serve(listener, settings)?.await.context("can't answer HTTP") })?;
    log::info!("stopped");
    Ok(())
}

/// A server that answers on `listener`. To be called within an actix system.
///
/// # Errors
/// When the settings can't be used.
pub fn serve(listener: TcpListener, settings: Settings) -> anyhow::Result<Server> {
    /// How long a connection is kept for the client's next request.
    const KEEP_ALIVE: Duration = Duration::from_secs(75);

    let http = settings.api_gateway;
    http.check()?;
    let pool_size = u32::try_from(http.blocking_threads).context("api_gateway.blocking_threads is too large")?;
    let database = Database::open(&storage::Settings { pool_size, ..settings.database }, SERVICE)?;
    let shared = Shared::new(database);
    // Of all workers together, as `shared` is.
    let results = web::Data::new(results::Cache::default());

    let address = listener.local_addr().context("can't tell the port")?;
    let (stop_grace_s, workers) = (http.stop_grace_ms.div_ceil(1000), http.workers);
    let (blocking_threads, request_timeout) = (http.blocking_threads / workers, http.request_timeout());
    let first_look = shared.clone();
    let server = HttpServer::new(move || {
        App::new()
            .app_data(web::Data::new(Gateway::new(http.clone(), shared.clone())))
            .app_data(results.clone())
            .wrap(from_fn(access::observe))
            .configure(routes::configure)
    })
    .workers(workers)
    .worker_max_blocking_threads(blocking_threads)
    .client_request_timeout(request_timeout)
    // So long may whoever is still sending a body that is refused take to read the answer.
    .client_disconnect_timeout(request_timeout)
    .keep_alive(KEEP_ALIVE)
    .shutdown_timeout(stop_grace_s)
    .listen(listener)
    .context("can't listen")?
    .run();
    log::info!(address:% = address; "listening");
    // On a thread of its own, which a stopping gateway needn't wait for.
    thread::spawn(move || match first_look.is_migrated() {
        Ok(true) => log::info!("ready"),
        Ok(false) => log::warn!("not ready: the database lacks migrations"),
        Err(error) => log::warn!("not ready: {error}"),
    });
    Ok(server)
}
