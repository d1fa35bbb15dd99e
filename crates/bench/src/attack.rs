//! What a gateway has to bear: clients that keep what they have opened and don't go on as clients do.

use crate::load::connect;
use anyhow::{Context as _, anyhow, ensure};
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Clients of the attack have addresses from here on; those of the load have the ones before.
const FIRST_CLIENT: usize = 10_000;

/// How often each of them does something.
const PERIOD: Duration = Duration::from_millis(500);

/// One who connects, sends this, and then nothing, or a byte now and then. Whoever is cut off comes again.
#[derive(Clone)]
pub(crate) struct Hostile {
    /// Sent as fast as it's taken.
    opening: Arc<[u8]>,
    /// Sent byte by byte after that, as long as there's any of it.
    drip: &'static [u8],
    /// Whether answers are read.
    reads: bool,
}

impl Hostile {
    /// Connects, and that's all.
    pub(crate) fn idle() -> Self {
        Self { opening: Arc::new([]), drip: b"", reads: true }
    }

    /// Sends half a request's head, and then a header that never ends.
    pub(crate) fn slow_head() -> Self {
        Self {
            opening: (*b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Slow: ").into(),
            drip: &[b'x'; 4096],
            reads: true,
        }
    }

    /// Sends half a tweet.
    pub(crate) fn slow_body() -> Self {
        let head = "POST /api/v1/post-tweet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let opening = format!("{head}Content-Length: 1000\r\n\r\n{{\"userId\": 1, \"text\": \"");
        Self { opening: opening.into_bytes().into(), drip: &[b'x'; 900], reads: true }
    }

    /// Sends so many bytes of account events, save for the last one.
    pub(crate) fn slow_events(bytes: usize) -> Self {
        let head = "POST /api/v1/event HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        let mut opening = format!("{head}Content-Length: {bytes}\r\n\r\n").into_bytes();
        opening.resize(opening.len() + bytes - 1, b' ');
        Self { opening: opening.into(), drip: b"", reads: true }
    }

    /// Asks for the same again and again and reads none of it.
    pub(crate) fn deaf(request: &[u8], times: usize) -> Self {
        Self { opening: request.repeat(times).into(), drip: b"", reads: false }
    }
}

/// What a client has done just now.
#[derive(PartialEq, Eq)]
enum Did {
    Nothing,
    Sent,
    /// The other side had ended the connection.
    CutOff,
}

struct Client {
    hostile: Hostile,
    number: usize,
    socket: Option<TcpStream>,
    sent: usize,
}

impl Client {
    /// Does what there is to do without waiting.
    fn act(&mut self, gateway: SocketAddr) -> anyhow::Result<Did> {
        let Hostile { opening, drip, reads } = &self.hostile;
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => {
                self.sent = 0;
                let buffer = (!reads).then_some(4096);
                self.socket.insert(connect(gateway, self.number, buffer).context("can't connect to the gateway")?)
            }
        };
        let rest = match self.sent.checked_sub(opening.len()) {
            None => &opening[self.sent..],
            Some(dripped) => drip.get(dripped..=dripped).unwrap_or_default(),
        };
        let mut did = Did::Nothing;
        if !rest.is_empty() {
            match socket.write(rest) {
                Ok(count) => {
                    self.sent += count;
                    did = Did::Sent;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => did = Did::CutOff,
            }
        }
        let mut buffer = [0; 4096];
        while *reads && did != Did::CutOff {
            match socket.read(&mut buffer) {
                Ok(1..) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(0) | Err(_) => did = Did::CutOff,
            }
        }
        if did == Did::CutOff {
            self.socket = None;
        }
        Ok(did)
    }
}

fn clients(hostile: &[Hostile]) -> Vec<Client> {
    let client = |(number, hostile): (usize, &Hostile)| Client {
        hostile: hostile.clone(),
        number: FIRST_CLIENT + number,
        socket: None,
        sent: 0,
    };
    hostile.iter().enumerate().map(client).collect()
}

/// Does `work` while these are at the gateway, all of whom have come before it begins. Returns what it returns, and how often
/// one of them was cut off.
pub(crate) fn during<T>(
    gateway: SocketAddr,
    hostile: &[Hostile],
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, usize)> {
    let mut clients = clients(hostile);
    let mut all_act = move || -> anyhow::Result<usize> {
        clients.iter_mut().try_fold(0, |cut_off, client| Ok(cut_off + usize::from(client.act(gateway)? == Did::CutOff)))
    };
    let mut cut_off = all_act()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let attack = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                cut_off += all_act()?;
                thread::sleep(PERIOD);
            }
            anyhow::Ok(cut_off)
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        let cut_off = attack.join().map_err(|_| anyhow!("the attack panicked"))??;
        Ok((done?, cut_off))
    })
}

/// Lets these send as fast as they can, each once, until nothing more was taken for as long as `keep`. Returns how many were
/// cut off.
pub(crate) fn burst(gateway: SocketAddr, hostile: &[Hostile], keep: Duration) -> anyhow::Result<usize> {
    const LIMIT: Duration = Duration::from_secs(60);
    let start = Instant::now();
    let mut clients = clients(hostile);
    let mut last_sent = start;
    while !clients.is_empty() && last_sent.elapsed() < keep {
        ensure!(start.elapsed() < LIMIT, "the gateway takes more and more of an attack");
        let mut left = Vec::new();
        for mut client in clients {
            match client.act(gateway)? {
                Did::CutOff => continue,
                Did::Sent => last_sent = Instant::now(),
                Did::Nothing => {}
            }
            left.push(client);
        }
        clients = left;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(hostile.len() - clients.len())
}
