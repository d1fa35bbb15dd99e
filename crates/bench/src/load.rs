//! A load of HTTP requests that is cheap for the machine that it shares with what it loads: one thread, requests that are
//! made beforehand, and of an answer only as much is read as tells where it ends.

use anyhow::{Context as _, bail, ensure};
use hdrhistogram::Histogram;
use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fd::OwnedFd,
};
use socket2::{Domain, Socket, Type};
use std::{
    collections::VecDeque,
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

/// How long the last answers are waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// When the next request is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// When a connection has its answer: a closed loop, which shows how much can be had.
    WhenAnswered,
    /// So many a second, at fixed times, whether or not answers have come: an open loop. One that finds no connection free
    /// waits for one, and its latency counts from when it was due.
    PerSecond(f64),
}

/// Requests over connections that stay, each from an address of its own.
pub(crate) struct Load<'a> {
    pub(crate) gateway: SocketAddr,
    /// Sent in turn.
    pub(crate) requests: &'a [Vec<u8>],
    pub(crate) connections: usize,
    pub(crate) pace: Pace,
    pub(crate) duration: Duration,
}

/// What came of a load.
pub(crate) struct Outcome {
    pub(crate) elapsed: Duration,
    /// Requests that were sent.
    pub(crate) sent: u64,
    /// Microseconds until a 2xx, from when the request was due. Those that were due and never sent count with how long they
    /// had waited.
    pub(crate) latencies: Histogram<u64>,
    /// 2xx answers.
    pub(crate) ok: u64,
    /// Microseconds until a 2xx, from when the request was sent.
    pub(crate) served: Histogram<u64>,
    /// Microseconds until a 503 with `Retry-After`, from when the request was sent.
    pub(crate) refusals: Histogram<u64>,
    /// Other answers.
    pub(crate) other: u64,
    /// Connections that ended instead of an answer.
    pub(crate) lost: u64,
    /// Requests that had no answer in the end.
    pub(crate) unanswered: u64,
}

impl Outcome {
    /// 2xx answers a second.
    pub(crate) fn rate(&self) -> f64 {
        self.ok as f64 / self.elapsed.as_secs_f64()
    }

    /// How many refusals took longer than this.
    pub(crate) fn refused_after(&self, limit: Duration) -> u64 {
        self.refusals.count_between(micros(limit), u64::MAX)
    }

    /// Fails where anything but a 2xx came.
    pub(crate) fn all_ok(self) -> anyhow::Result<Self> {
        let Self { sent, ok, refusals, other, lost, unanswered, .. } = &self;
        let refused = refusals.len();
        ensure!(
            ok == sent,
            "of {sent} requests {ok} were answered well, {refused} refused, {other} answered otherwise; \
             {lost} connections ended, {unanswered} requests had no answer"
        );
        Ok(self)
    }
}

/// Opens a connection from an address of this machine's own net 127.0.0.0/8: limits for each client's address are then what
/// they are for so many clients.
pub(crate) fn connect(gateway: SocketAddr, client: usize, receive_buffer: Option<usize>) -> std::io::Result<TcpStream> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let [.., high, low] = u32::try_from(client).unwrap_or_default().to_be_bytes();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::new(127, 1, high, low), 0)).into())?;
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    socket.connect_timeout(&gateway.into(), TIMEOUT)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

struct Connection {
    socket: TcpStream,
    /// Of an answer that isn't whole yet.
    received: Vec<u8>,
    /// When the request in hand was due, and when it was sent.
    request: Option<(Instant, Instant)>,
}

/// The beginning of an answer that is whole.
struct Answer {
    status: u16,
    retry_after: bool,
}

/// What reading from a connection brought.
enum Event {
    Answer(Answer),
    /// More is to come.
    Part,
    Closed,
}

impl Connection {
    fn open(load: &Load<'_>, number: usize, epoll: &OwnedFd) -> anyhow::Result<Self> {
        let socket = connect(load.gateway, number, None).context("can't connect to the gateway")?;
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(epoll, &socket, data, epoll::EventFlags::IN).context("can't await answers")?;
        Ok(Self { socket, received: Vec::new(), request: None })
    }

    fn read(&mut self, buffer: &mut [u8]) -> anyhow::Result<Event> {
        let count = match self.socket.read(buffer) {
            Ok(0) => return Ok(Event::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Event::Part),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Event::Closed),
            Err(error) => return Err(error).context("can't read an answer"),
        };
        if self.received.is_empty()
            && let Some(answer) = whole(&buffer[..count])?
        {
            return Ok(Event::Answer(answer));
        }
        self.received.extend_from_slice(&buffer[..count]);
        let answer = whole(&self.received)?;
        if answer.is_some() {
            self.received.clear();
        }
        Ok(answer.map_or(Event::Part, Event::Answer))
    }
}

/// The answer that these bytes are, if they are all of it.
fn whole(bytes: &[u8]) -> anyhow::Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = head.parse(bytes).context("an answer that isn't HTTP")? else {
        return Ok(None);
    };
    let header = |name: &str| head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
    let body = header("content-length").context("an answer without a length")?.value;
    let body: usize = std::str::from_utf8(body)?.parse().context("a length that is no number")?;
    ensure!(bytes.len() <= length + body, "more than the answer came");
    let answer = Answer {
        status: head.code.context("an answer without a status")?,
        retry_after: header("retry-after").is_some(),
    };
    Ok((bytes.len() == length + body).then_some(answer))
}

/// The 99th percentile, in milliseconds.
pub(crate) fn p99_ms(micros: &Histogram<u64>) -> f64 {
    micros.value_at_quantile(0.99) as f64 / 1000.0
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Load<'_> {
    /// When request number `number` is due; with a closed loop, at any time.
    fn due(&self, number: u64, start: Instant) -> Option<Instant> {
        match self.pace {
            Pace::WhenAnswered => None,
            Pace::PerSecond(rate) => Some(start + Duration::from_secs_f64(number as f64 / rate)),
        }
    }

    /// Runs it.
    pub(crate) fn run(&self) -> anyhow::Result<Outcome> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("can't await answers")?;
        let mut connections: Vec<_> = (0..self.connections)
            .map(|number| Connection::open(self, number, &epoll))
            .collect::<anyhow::Result<_>>()?;
        let mut free: VecDeque<usize> = (0..self.connections).collect();
        let mut events = Vec::with_capacity(self.connections.min(256));
        let mut buffer = vec![0; 1 << 16];
        let mut outcome = Outcome {
            elapsed: Duration::ZERO,
            sent: 0,
            latencies: Histogram::new(3)?,
            ok: 0,
            served: Histogram::new(3)?,
            refusals: Histogram::new(3)?,
            other: 0,
            lost: 0,
            unanswered: 0,
        };
        let mut requests = self.requests.iter().cycle();
        let start = Instant::now();
        let end = start + self.duration;
        let mut now = start;
        loop {
            while now < end
                && let due = self.due(outcome.sent, start).unwrap_or(now)
                && due <= now
                && let Some(number) = free.pop_front()
            {
                let connection = &mut connections[number];
                let request = requests.next().context("no requests")?;
                outcome.sent += 1;
                match connection.socket.write(request) {
                    Ok(count) if count == request.len() => connection.request = Some((due, now)),
                    Ok(_) => bail!("a socket that takes no whole request"),
                    Err(error) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {
                        outcome.lost += 1;
                        *connection = Connection::open(self, number, &epoll)?;
                        free.push_back(number);
                    }
                    Err(error) => return Err(error).context("can't send a request"),
                }
            }
            let in_hand = self.connections - free.len();
            if now >= end && (in_hand == 0 || now > end + PATIENCE) {
                outcome.unanswered = in_hand as u64;
                break;
            }
            // An epoll's own time limit has whole milliseconds.
            events.clear();
            epoll::wait(&epoll, spare_capacity(&mut events), Some(&Timespec::default()))?;
            if events.is_empty() {
                let next = match self.due(outcome.sent, start) {
                    _ if now >= end => now + PATIENCE,
                    Some(due) if !free.is_empty() => due.min(end),
                    _ => end,
                };
                let rest = Timespec::try_from(next.saturating_duration_since(now)).context("an impossible time")?;
                poll(&mut [PollFd::new(&epoll, PollFlags::IN)], Some(&rest))?;
                epoll::wait(&epoll, spare_capacity(&mut events), Some(&Timespec::default()))?;
            }
            now = Instant::now();
            for event in &events {
                let number = usize::try_from(event.data.u64())?;
                let connection = &mut connections[number];
                let read = connection.read(&mut buffer)?;
                match (read, connection.request) {
                    (Event::Part, _) => {}
                    (Event::Closed, request) => {
                        *connection = Connection::open(self, number, &epoll)?;
                        if request.is_some() {
                            outcome.lost += 1;
                            free.push_back(number);
                        }
                    }
                    (Event::Answer(_), None) => bail!("an answer that nobody asked for"),
                    (Event::Answer(Answer { status, retry_after }), Some((due, sent))) => {
                        match status {
                            200..300 => {
                                outcome.ok += 1;
                                outcome.latencies.record(micros(now - due))?;
                                outcome.served.record(micros(now - sent))?;
                            }
                            503 if retry_after => outcome.refusals.record(micros(now - sent))?,
                            _ => outcome.other += 1,
                        }
                        connection.request = None;
                        free.push_back(number);
                    }
                }
            }
        }
        outcome.elapsed = now - start;
        for unsent in outcome.sent.. {
            let Some(due) = self.due(unsent, start).filter(|due| *due < end) else { break };
            outcome.latencies.record(micros(end - due))?;
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::{
        io::{BufRead as _, BufReader},
        net::TcpListener,
        thread,
    };

    /// A server that answers each connection's requests in turn with these, and then ends the connection.
    fn serve(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                thread::spawn(move || {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    for answer in answers {
                        // A request is two lines here.
                        if lines.by_ref().take(2).any(|line| line.is_err())
                            || stream.write_all(answer.as_bytes()).is_err()
                        {
                            return;
                        }
                    }
                    // The last one has no answer.
                    lines.by_ref().take(2).for_each(drop);
                });
            }
        });
        address
    }

    const GOOD: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    const BUSY: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n";
    const BAD: &str = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n";

    fn load(gateway: SocketAddr, pace: Pace) -> Outcome {
        let requests = [b"GET / HTTP/1.1\r\n\r\n".to_vec()];
        Load { gateway, requests: &requests, connections: 2, pace, duration: Duration::from_millis(200) }.run().unwrap()
    }

    #[test]
    fn every_request_counts_as_what_became_of_it() {
        let outcome = load(serve(&[GOOD, BUSY, GOOD, BAD]), Pace::WhenAnswered);
        let Outcome { sent, ok, ref refusals, other, lost, unanswered, .. } = outcome;
        assert_eq!(ok + refusals.len() + other + lost + unanswered, sent);
        assert_eq!((outcome.latencies.len(), unanswered), (ok, 0));
        assert!(ok > 0 && !refusals.is_empty() && other > 0 && lost > 0, "{ok} {other} {lost}");
        assert!(outcome.all_ok().is_err());
    }

    #[test]
    fn what_was_due_counts_whether_or_not_it_could_be_sent_at_once() {
        let outcome = load(serve(&[GOOD; 1000]), Pace::PerSecond(500.0));
        assert_eq!(outcome.latencies.len(), 100);
        assert!(outcome.ok == outcome.sent && outcome.ok <= 100, "{}", outcome.ok);
    }

    #[test]
    fn an_answer_is_whole_with_the_last_byte_of_its_body() {
        let answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\nretry-after: 2\r\n\r\nabc";
        for length in 0..answer.len() {
            assert!(whole(&answer[..length]).unwrap().is_none(), "{length}");
        }
        let Answer { status, retry_after } = whole(answer).unwrap().unwrap();
        assert_eq!((status, retry_after), (503, true));
        assert!(whole(&[&answer[..], b"d"].concat()).is_err());
        assert!(whole(b"HTTP/1.1 200 OK\r\n\r\n").is_err(), "nothing says where it ends");
    }
}
