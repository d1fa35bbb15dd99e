//! `GET /health/live` and `GET /health/ready` on a small port of their own.

use actix_web::{App, HttpResponse, HttpServer, dev::ServerHandle, rt, web};
use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

/// The section `[health]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The address to listen on.
    pub address: IpAddr,
    /// The port; 0 takes any that is free.
    pub port: u16,
}

/// Tells whether one thing is well, and if not, why, in words that hold no secret.
pub type Probe = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What has to be well for the process to be alive, and to be ready.
#[derive(Default)]
pub struct Health {
    live: Vec<(&'static str, Probe)>,
    ready: Vec<(&'static str, Probe)>,
}

impl Health {
    /// Nothing has to be well yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds something without which only a restart helps.
    #[must_use]
    pub fn live(mut self, what: &'static str, probe: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.live.push((what, Box::new(probe)));
        self
    }

    /// Adds something without which there's nothing to do but wait.
    #[must_use]
    pub fn ready(mut self, what: &'static str, probe: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.ready.push((what, Box::new(probe)));
        self
    }
}

#[derive(Serialize)]
struct Answer {
    status: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct Missing {
    what: &'static str,
    why: String,
}

/// Probes may wait for a server, so they run apart from the thread that answers.
async fn answer(health: web::Data<Health>, probes: fn(&Health) -> &Vec<(&'static str, Probe)>) -> HttpResponse {
    let missing = web::block(move || {
        let failed = |(what, probe): &(&'static str, Probe)| probe().err().map(|why| Missing { what, why });
        probes(&health).iter().filter_map(failed).collect::<Vec<_>>()
    })
    .await;
    match missing {
        Ok(missing) if missing.is_empty() => HttpResponse::Ok().json(Answer { status: "ok", missing }),
        Ok(missing) => HttpResponse::ServiceUnavailable().json(Answer { status: "unavailable", missing }),
        Err(_) => HttpResponse::ServiceUnavailable().json(Answer { status: "unavailable", missing: Vec::new() }),
    }
}

/// Answers until it's dropped.
pub struct Server {
    address: SocketAddr,
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Stopping takes effect without the future's being awaited.
        drop(self.handle.stop(false));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts answering.
///
/// # Errors
/// When the port can't be listened on.
pub fn serve(settings: &Settings, health: Health) -> anyhow::Result<Server> {
    let listener = TcpListener::bind((settings.address, settings.port))
        .with_context(|| format!("can't listen on {}:{}", settings.address, settings.port))?;
    let address = listener.local_addr().context("can't tell the health port")?;
    let health = web::Data::from(Arc::new(health));
    let server = HttpServer::new(move || {
        App::new()
            .app_data(health.clone())
            .route("/health/live", web::get().to(|health| answer(health, |health| &health.live)))
            .route("/health/ready", web::get().to(|health| answer(health, |health| &health.ready)))
    })
    .workers(1)
    .worker_max_blocking_threads(2)
    .client_request_timeout(Duration::from_secs(5))
    .disable_signals()
    .listen(listener)
    .context("can't answer health checks")?
    .run();
    let handle = server.handle();
    let serve = move || {
        if let Err(error) = rt::System::new().block_on(server) {
            log::error!("health checks are no longer answered: {error}");
        }
    };
    let thread = thread::Builder::new().name("health".into()).spawn(serve).context("can't start a thread")?;
    log::info!("health checks on http://{address}/health/ready");
    Ok(Server { address, handle, thread: Some(thread) })
}

/// Where a service's process answers, by its settings.
///
/// # Errors
/// When they can't be used.
pub(crate) fn address(service: &str) -> anyhow::Result<SocketAddr> {
    #[derive(Deserialize)]
    struct Sections {
        health: Settings,
    }
    let Sections { health: Settings { address, port } } = settings::load(service)?;
    Ok(SocketAddr::new(address, port))
}

/// Asks a process whether it's ready, and prints its answer.
///
/// # Errors
/// When it isn't, or doesn't answer.
pub(crate) fn probe(address: SocketAddr) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(4);
    let no_answer = || format!("no answer from {address}");
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).with_context(no_answer)?;
    stream.set_read_timeout(Some(PATIENCE)).with_context(no_answer)?;
    let request = format!("GET /health/ready HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).with_context(no_answer)?;
    let mut answer = String::new();
    stream.take(64 * 1024).read_to_string(&mut answer).with_context(no_answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(no_answer)?;
    println(body);
    ensure!(head.split(' ').nth(1) == Some("200"), "not ready");
    Ok(())
}

fn println(line: &str) {
    // A reader that has gone away needs no answer.
    let _ = writeln!(std::io::stdout(), "{line}");
}
