//! Sending metrics: over UDP, buffered, never waiting. What the network doesn't take at once is lost.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use cadence::{BufferedUdpMetricSink, MetricResult, StatsdClient};

use crate::Error;

const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How often the server's name is looked up: again while it can't be resolved, and anew afterwards, as it may have moved.
const RESOLVE_EVERY: Duration = Duration::from_secs(30);
/// What fits into one packet on Ethernet.
const BUFFER_BYTES: usize = 1432;

static CLIENT: OnceLock<StatsdClient> = OnceLock::new();

/// The client, if metrics are on and the server's name was resolved.
pub(crate) fn client() -> Option<&'static StatsdClient> {
    CLIENT.get()
}

/// Sends what is buffered. For a process that is about to end without dropping its [`Guard`](crate::Guard).
pub fn flush() {
    if let Some(client) = client() {
        let _ = client.flush();
    }
}

/// Its drop ends the thread that flushes.
#[derive(Debug)]
pub(crate) struct Sender {
    _alive: mpsc::Sender<()>,
}

pub(crate) fn start(address: &str, prefix: &str) -> Result<Option<Sender>, Error> {
    if address.is_empty() {
        return Ok(None);
    }
    let port = address.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    if !matches!(port, Some(Ok(_))) {
        return Err(Error::Statsd(address.to_owned()));
    }
    let (server, prefix) = (Server(address.to_owned()), prefix.to_owned());
    if let Err(error) = connect(&server, &prefix) {
        log::warn!(server = address, error:% = error; "no metrics until the statsd server's name can be resolved");
    }
    let (alive, ended) = mpsc::channel();
    thread::Builder::new()
        .name("statsd".to_owned())
        .spawn(move || {
            let wait = || if client().is_some() { FLUSH_EVERY } else { RESOLVE_EVERY };
            while ended.recv_timeout(wait()) == Err(RecvTimeoutError::Timeout) {
                match client() {
                    Some(_) => flush(),
                    None => drop(connect(&server, &prefix)),
                }
            }
        })
        .map_err(Error::Thread)?;
    Ok(Some(Sender { _alive: alive }))
}

fn connect(server: &Server, prefix: &str) -> MetricResult<()> {
    let any = if server.to_socket_addrs()?.any(|address| address.is_ipv4()) { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    let sink = BufferedUdpMetricSink::builder()
        .with_capacity(BUFFER_BYTES)
        .with_resolver_period(RESOLVE_EVERY)
        .build(server.clone(), socket)?;
    CLIENT.get_or_init(|| StatsdClient::from_sink(prefix, sink));
    Ok(())
}

/// A server's `host:port`. Its IPv4 addresses come first: a statsd server listens on those alone by default.
#[derive(Debug, Clone)]
struct Server(String);

impl ToSocketAddrs for Server {
    type Iter = std::vec::IntoIter<SocketAddr>;

    fn to_socket_addrs(&self) -> io::Result<Self::Iter> {
        let mut addresses: Vec<_> = self.0.to_socket_addrs()?.collect();
        addresses.sort_by_key(SocketAddr::is_ipv6);
        Ok(addresses.into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::{client, start};
    use crate::Error;

    #[test]
    fn an_address_without_a_port_is_refused() {
        for address in ["localhost", "localhost:", "localhost:statsd", "localhost:70000", "::"] {
            assert!(matches!(start(address, "m"), Err(Error::Statsd(refused)) if refused == address), "{address}");
        }
    }

    #[test]
    fn a_server_that_cannot_be_resolved_is_no_error_and_gets_nothing() {
        assert!(start("statsd.invalid:8125", "m").unwrap().is_some());
        assert!(client().is_none());
    }

    #[test]
    fn without_a_server_nothing_runs() {
        assert!(start("", "m").unwrap().is_none());
    }
}
