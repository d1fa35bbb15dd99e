//! A client that sends whatever bytes, and reads what comes back.

use crate::app::Answer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream},
    time::Duration,
};
use ureq::http::{HeaderMap, HeaderName, HeaderValue};

/// A bound against hanging, not a figure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets this program, and those that it starts, have as many connections as the machine allows: the usual limit is for fewer.
pub(crate) fn allow_connections() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
}

/// A connection to the gateway.
pub(crate) struct Raw {
    stream: TcpStream,
    /// What has come and isn't an answer yet.
    received: Vec<u8>,
    ended: bool,
}

/// How the connections of a test differ from others.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    /// Of the net 127.0.0.0/8, all of which is this machine.
    pub(crate) address: Ipv4Addr,
    /// What the kernel keeps of what isn't read.
    pub(crate) receive_buffer: Option<usize>,
}

impl Default for Client {
    fn default() -> Self {
        Self { address: Ipv4Addr::LOCALHOST, receive_buffer: None }
    }
}

impl Client {
    pub(crate) fn connect(self, gateway: SocketAddr) -> Raw {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((self.address, 0)).into()).unwrap();
        if let Some(bytes) = self.receive_buffer {
            socket.set_recv_buffer_size(bytes).unwrap();
        }
        socket.connect_timeout(&gateway.into(), PATIENCE).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, received: Vec::new(), ended: false }
    }
}

impl Raw {
    pub(crate) fn connect(gateway: SocketAddr) -> Self {
        Client::default().connect(gateway)
    }

    /// Sends all of it, unless the gateway has ended the connection; returns whether it hadn't.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        match self.stream.write_all(bytes.as_ref()) {
            Ok(()) => true,
            Err(error) if is_end(error.kind()) => false,
            Err(error) => panic!("the gateway takes nothing, and doesn't end the connection: {error}"),
        }
    }

    /// Sends as much as is taken without waiting.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> usize {
        self.stream.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while sent < bytes.len()
            && let Ok(count) = self.stream.write(&bytes[sent..])
        {
            sent += count;
        }
        self.stream.set_nonblocking(false).unwrap();
        sent
    }

    /// Says that nothing more will be sent.
    pub(crate) fn finish(&self) {
        // The gateway may have ended the connection.
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// The next answer to a request that wasn't a HEAD; none when the connection has ended.
    pub(crate) fn answer(&mut self) -> Option<Answer> {
        loop {
            if let Some((answer, length)) = parse(&self.received, self.ended) {
                self.received.drain(..length);
                return Some(answer);
            }
            if self.ended {
                let rest = String::from_utf8_lossy(&self.received);
                assert!(rest.is_empty() || rest.starts_with("HTTP/1."), "no HTTP: {rest:.200}");
                return None;
            }
            self.read();
        }
    }

    /// Every answer until the connection ends.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        std::iter::from_fn(|| self.answer()).collect()
    }

    /// What has come so far, without waiting.
    pub(crate) fn peek(&mut self) -> &[u8] {
        self.stream.set_nonblocking(true).unwrap();
        let mut buffer = [0; 1 << 16];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    self.received.extend_from_slice(&buffer[..count]);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.ended = true,
            }
            break;
        }
        self.stream.set_nonblocking(false).unwrap();
        &self.received
    }

    /// Whether anything has come, which stays unread.
    pub(crate) fn has_received(&self) -> bool {
        self.stream.peek(&mut [0]).is_ok_and(|count| count > 0)
    }

    /// Whether the gateway has ended the connection, as far as has come here.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.peek();
        self.ended
    }

    fn read(&mut self) {
        let mut buffer = [0; 1 << 16];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => self.received.extend_from_slice(&buffer[..count]),
            Err(error) if is_end(error.kind()) => self.ended = true,
            Err(error) => panic!("neither an answer nor the connection's end: {error}"),
        }
    }
}

fn is_end(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted)
}

/// An answer at the beginning of these bytes, and its length, if all of it is there.
fn parse(bytes: &[u8], ended: bool) -> Option<(Answer, usize)> {
    let head = bytes.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).unwrap();
    let mut lines = text.lines();
    let status_line = lines.next().unwrap();
    assert!(status_line.starts_with("HTTP/1.1 ") || status_line.starts_with("HTTP/1.0 "), "{status_line}");
    let status = status_line[9..12].parse().unwrap();
    let header = |line: &str| {
        let (name, value) = line.split_once(':').unwrap();
        (HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value.trim()).unwrap())
    };
    let headers: HeaderMap = lines.filter(|line| !line.is_empty()).map(header).collect();
    let length = match headers.get("content-length") {
        Some(length) => length.to_str().unwrap().parse().unwrap(),
        // Interim answers have no body.
        None if status < 200 || status == 204 => 0,
        None if ended => bytes.len() - head,
        None => return None,
    };
    let body = bytes.get(head..head + length)?.to_vec();
    Some((Answer { status, headers, body }, head + length))
}
