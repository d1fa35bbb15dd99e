//! The server: workers that answer HTTP on connections within their limits.

use crate::{
    access,
    body::{self, Announced},
    clients::Clients,
    connections::{Addresses, Connection, Connections, Limits, State},
    gateway::{Gateway, Shared},
    results, routes,
    settings::HttpSettings,
};
use actix_http::{HttpService, KeepAlive, Protocol, Request, Response};
use actix_server::Server;
use actix_service::{ServiceFactoryExt as _, fn_service, map_config};
use actix_web::{App, Error, body::BoxBody, dev::AppConfig, middleware::from_fn, rt::net::TcpStream, web};
use std::{io, net::TcpListener, rc::Rc, sync::Arc, time::Duration};

/// Starts the workers on `listener`.
pub(crate) fn start(listener: TcpListener, http: HttpSettings, shared: Shared) -> io::Result<Server> {
    /// How long a client that was refused amid its body may take to read the answer.
    const DISCONNECT: Duration = Duration::from_secs(5);
    let address = listener.local_addr()?;
    let builder = Server::build().workers(http.workers).shutdown_timeout(http.stop_grace_ms.div_ceil(1000));
    let shutdown = builder.graceful_shutdown_signal();
    // Of all workers together, as `shared` is.
    let (results, addresses) = (web::Data::new(results::Cache::default()), Addresses::default());
    let clients = Arc::new(Clients::of(&http));
    let server = builder.listen(crate::SERVICE, listener, move || {
        let (http, shared, results, shutdown) = (http.clone(), shared.clone(), results.clone(), shutdown.clone());
        let connections = Rc::new(Connections::new(Limits::of(&http), addresses.clone()));
        let (clients, limits) = (clients.clone(), http.clone());
        let app = App::new()
            .app_data(web::Data::new(Gateway::new(http, shared)))
            .app_data(web::Data::from(clients.clone()))
            .app_data(results)
            .wrap(from_fn(access::observe))
            .configure(routes::configure);
        let expected = move |req: Request| {
            // Before its client has begun with it.
            let refused = body::allowed(req.path(), req.head().headers(), &limits).err();
            if let (Some(_), Some(connection)) = (&refused, req.conn_data::<Rc<State>>()) {
                connection.begin(Announced::by(req.head().headers()), true);
                connection.answer(None);
            }
            async move { refused.map_or(Ok(req), |error| Err(Response::<BoxBody>::from(Error::from(error)))) }
        };
        // Idle connections are ours to end.
        let http = HttpService::build()
            .graceful_shutdown_signal(move || {
                let signal = shutdown.clone();
                async move { signal.notified().await }
            })
            .keep_alive(KeepAlive::Os)
            .client_request_timeout(Duration::ZERO)
            .client_disconnect_timeout(DISCONNECT)
            .local_addr(address)
            .expect(fn_service(expected))
            .on_connect_ext(|connection: &Connection, data| {
                data.insert(connection.state().clone());
            })
            .finish(map_config(app, |()| AppConfig::default()));
        fn_service(move |socket: TcpStream| {
            let peer = socket.peer_addr().ok();
            // Answers are written in one go.
            let _ = socket.set_nodelay(true);
            let counted = peer.map(|peer| peer.ip()).filter(|address| clients.is_counted(*address));
            let connection = connections.admit(socket, counted);
            async move { connection.map(|connection| (connection, Protocol::Http1, peer)).ok_or(Refused) }
        })
        .map_err(|Refused| ())
        .and_then(http.map_err(|_| ()))
    })?;
    Ok(server.run())
}

/// There are too many connections.
struct Refused;
