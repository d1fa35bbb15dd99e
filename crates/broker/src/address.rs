use std::{
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::bounded;
use percent_encoding::percent_decode_str;
use settings::Secret;
use url::Url;

use crate::Error;

const CONNECTING: &str = "connecting";

/// What an `amqp://` URL says.
#[derive(PartialEq, Eq)]
pub(crate) struct Address {
    host: String,
    port: u16,
    pub(crate) user: String,
    pub(crate) password: String,
    pub(crate) vhost: String,
}

impl Address {
    pub(crate) fn parse(url: &Secret) -> Result<Self, Error> {
        let invalid = |reason: &str| Error::Url(reason.into());
        let url = Url::parse(url.expose()).map_err(|error| Error::Url(format!("isn't a URL: {error}")))?;
        if url.scheme() != "amqp" {
            return Err(invalid("must start with amqp:// (TLS isn't supported)"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("must end with the virtual host"));
        }
        let decode = |part: &str| match percent_decode_str(part).decode_utf8() {
            Ok(text) => Ok(text.into_owned()),
            Err(_) => Err(invalid("must be UTF-8, percent-encoded")),
        };
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| invalid("names no host"))?;
        let vhost = match url.path() {
            "" | "/" => "/".to_owned(),
            path if path[1..].contains('/') => return Err(invalid("has a `/` in its virtual host; write it as %2f")),
            path => decode(&path[1..])?,
        };
        let (user, password) = match (url.username(), url.password()) {
            ("", None) => ("guest".into(), "guest".into()),
            (user, password) => (decode(user)?, decode(password.unwrap_or_default())?),
        };
        // Brackets belong to the URL's way of writing an IPv6 address.
        let host = decode(host.trim_start_matches('[').trim_end_matches(']'))?;
        Ok(Self { host, port: url.port().unwrap_or(5672), user, password, vhost })
    }

    /// Connects to the first of the host's addresses that answers, within `limit` in all. The socket sends at once:
    /// waiting for more to send would cost up to 40 ms for each message that is published by itself.
    pub(crate) fn connect(&self, limit: Duration) -> Result<TcpStream, Error> {
        let deadline = Instant::now() + limit;
        let mut failure = Error::lost(CONNECTING, "the host has no address");
        for address in self.resolve(limit)? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::TimedOut { doing: CONNECTING, after: limit });
            }
            let connected = TcpStream::connect_timeout(&address, left);
            match connected.and_then(|socket| socket.set_nodelay(true).map(|()| socket)) {
                Ok(socket) => return Ok(socket),
                Err(error) => failure = Error::lost(CONNECTING, error),
            }
        }
        Err(failure)
    }

    /// Looking up a name can't be given a time limit; a thread that is left behind can.
    fn resolve(&self, limit: Duration) -> Result<Vec<SocketAddr>, Error> {
        const RESOLVING: &str = "looking up its host";
        let (sender, receiver) = bounded(1);
        let (host, port) = (self.host.clone(), self.port);
        thread::Builder::new()
            .name("broker-lookup".into())
            .spawn(move || sender.send((host.as_str(), port).to_socket_addrs().map(Vec::from_iter)))
            .map_err(|error| Error::lost(RESOLVING, error))?;
        match receiver.recv_timeout(limit) {
            Ok(addresses) => addresses.map_err(|error| Error::lost(RESOLVING, error)),
            Err(_) => Err(Error::TimedOut { doing: RESOLVING, after: limit }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn parse(url: &str) -> Result<Address, String> {
        Address::parse(&url.into()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_part_of_a_url_is_read_and_decoded() {
        let cases = [
            ("amqp://me:p%40ss%2F@broker:7000/my%2fhost", ["broker", "7000", "me", "p@ss/", "my/host"]),
            ("amqp://me:secret@127.0.0.1", ["127.0.0.1", "5672", "me", "secret", "/"]),
            ("amqp://me:secret@[::1]:7000/", ["::1", "7000", "me", "secret", "/"]),
            ("amqp://broker/%2f", ["broker", "5672", "guest", "guest", "/"]),
        ];
        for (url, wanted) in cases {
            let Address { host, port, user, password, vhost } = parse(url).unwrap();
            assert_eq!([host, port.to_string(), user, password, vhost], wanted, "{url}");
        }
    }

    #[test]
    fn the_socket_sends_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("amqp://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let socket = Address::parse(&url.into()).unwrap().connect(Duration::from_secs(5)).unwrap();
        assert!(socket.nodelay().unwrap());
    }

    #[test]
    fn a_wrong_url_is_refused_without_showing_it() {
        let cases = [
            ("secret", "isn't a URL"),
            ("amqps://me:secret@broker/", "must start with amqp://"),
            ("amqp:///secret", "names no host"),
            ("amqp://me:secret@broker:port/", "isn't a URL"),
            ("amqp://me:secret@broker/a/b", "write it as %2f"),
            ("amqp://me:secret%ff@broker/", "must be UTF-8"),
            ("amqp://me:secret@broker/?heartbeat=0", "must end with the virtual host"),
        ];
        for (url, wanted) in cases {
            let error = parse(url).err().unwrap_or_else(|| panic!("{url} was accepted"));
            assert!(error.contains(wanted), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
