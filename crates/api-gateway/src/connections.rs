//! Connections of clients, bounded in number, bytes and time.
//!
//! The server times the head of the first request of a connection alone, and the pause between two. What it reads and writes
//! goes through [`Connection`], which holds every request to the limits: its head to a size and a time, an answer to the time
//! that its client takes to read it, a connection without a request to the time that it may wait for one.

use crate::{
    body::{Announced, Taken},
    error::Error,
    settings::HttpSettings,
};
use actix_web::{
    HttpResponse, ResponseError as _,
    body::MessageBody as _,
    rt::{
        net::TcpStream,
        spawn,
        time::{Instant, Sleep, sleep_until, timeout},
    },
    web::{Buf as _, BytesMut},
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    future::poll_fn,
    io,
    net::IpAddr,
    pin::Pin,
    rc::{Rc, Weak},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

/// How long a client that was refused may take to read why.
const DRAIN: Duration = Duration::from_secs(2);

/// What connections are held to.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Bytes of a request's head.
    head_bytes: usize,
    /// From the first byte of a head to its end.
    head: Duration,
    /// From an answer to the next request's first byte.
    idle: Duration,
    /// How long an answer may be on its way.
    write: Duration,
    /// How many there may be, of each worker.
    connections: usize,
    /// How many of them may come from one address, of all workers.
    per_address: usize,
}

impl Limits {
    pub(crate) fn of(http: &HttpSettings) -> Self {
        Self {
            head_bytes: http.head_limit_bytes,
            head: Duration::from_millis(http.head_timeout_ms),
            idle: Duration::from_millis(http.idle_timeout_ms),
            write: Duration::from_millis(http.write_timeout_ms),
            connections: http.connections.div_ceil(http.workers),
            per_address: http.connections_per_address,
        }
    }
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing of a request has come.
    Idle,
    /// Some of a request's head has.
    Head,
    /// A request is being answered, and more of its body may come.
    Receiving,
    /// A request is being answered, and its body has come.
    Answering,
    /// Its answer is on its way.
    Answered,
    /// It's to end: what still comes isn't read.
    Refused,
}

/// What is known of a connection, for itself and for those who handle its requests.
pub(crate) struct State {
    phase: Cell<Phase>,
    /// When the phase began.
    since: Cell<Instant>,
    /// Bytes that were read since then.
    read: Cell<usize>,
    /// Bytes of the body that are still to come, where they are known.
    body_left: Cell<Option<u64>>,
    /// What the answer takes of all that answers may.
    taken: Cell<Option<Taken>>,
    /// Whoever waits for more to read.
    reader: RefCell<Option<Waker>>,
    /// Since when an answer couldn't be written on.
    stalled: Cell<Option<Instant>>,
    /// The request that waits until it can.
    writer: RefCell<Option<Waker>>,
    /// Whether they wait for another phase, too.
    is_held: Cell<bool>,
    /// Whether the server is to look at what it has before it gets more.
    is_paused: Cell<bool>,
    /// Whether the connection ends with the request in hand.
    is_last: Cell<bool>,
}

impl State {
    fn new() -> Self {
        Self {
            phase: Cell::new(Phase::Idle),
            since: Cell::new(Instant::now()),
            read: Cell::new(0),
            body_left: Cell::default(),
            taken: Cell::default(),
            reader: RefCell::default(),
            stalled: Cell::default(),
            writer: RefCell::default(),
            is_held: Cell::default(),
            is_paused: Cell::default(),
            is_last: Cell::default(),
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.read.set(0);
        self.is_paused.set(false);
        if self.is_held.take() {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// The head of a request is there. Its body is still to come, if it has one. Returns whether it's to be served: what comes after
    /// a request that was to be the last isn't (RFC 9112, section 9.6).
    pub(crate) fn begin(&self, body: Announced, is_last: bool) -> bool {
        self.body_left.set(match body {
            Announced::Bytes(count) => Some(count),
            Announced::Nothing | Announced::Chunks => None,
        });
        self.enter(if body == Announced::Nothing { Phase::Answering } else { Phase::Receiving });
        !self.is_last.replace(self.is_last.get() || is_last)
    }

    /// Waits until earlier answers have been written: the server would collect those that aren't read. Requests that come behind a
    /// chunked body may be in its hands before that.
    pub(crate) async fn written(&self) {
        poll_fn(|cx| match self.stalled.get() {
            Some(_) => {
                *self.writer.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        })
        .await;
    }

    /// All of the body is there.
    pub(crate) fn received(&self) {
        if self.phase.get() == Phase::Receiving {
            self.enter(Phase::Answering);
        }
    }

    /// The answer goes out. Returns whether it's the last one: where the body has been left unread, the next request can't be
    /// found.
    pub(crate) fn answer(&self, taken: Option<Taken>) -> bool {
        self.taken.set(taken);
        self.is_last.set(self.is_last.get() || self.phase.get() == Phase::Receiving);
        self.enter(Phase::Answered);
        self.is_last.get()
    }

    fn is_idle(&self) -> bool {
        self.phase.get() == Phase::Idle
    }

    /// Ends an idle connection.
    fn evict(&self) {
        self.enter(Phase::Refused);
        self.wake();
    }

    fn keep_reader(&self, cx: &Context<'_>) {
        let mut reader = self.reader.borrow_mut();
        if !reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            *reader = Some(cx.waker().clone());
        }
    }
}

/// A client's connection.
pub(crate) struct Connection {
    socket: TcpStream,
    state: Rc<State>,
    limits: Rc<Limits>,
    /// Fires at the end of the phase, or sooner where it was armed for another one.
    timer: Pin<Box<Sleep>>,
    /// What has come after the request in hand.
    ahead: BytesMut,
    head_end: HeadEnd,
    /// An answer of our own in place of the server's, and how much of it is written.
    own: Option<(Vec<u8>, usize)>,
    /// How long what comes after the last answer is still thrown away, and until when that is.
    drain_for: Duration,
    drain_until: Option<Instant>,
    _place: Place,
}

impl Connection {
    pub(crate) fn state(&self) -> &Rc<State> {
        &self.state
    }

    /// Waits for the deadline, and tells when it's over.
    fn poll_deadline(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        // Later ones are waited for when the timer fires: most of them never come.
        if deadline < self.timer.deadline() || self.timer.is_elapsed() {
            self.timer.as_mut().reset(deadline);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
    }

    /// Answers in place of the server, and has the connection end.
    fn refuse(&mut self, error: Option<Error>) {
        self.state.enter(Phase::Refused);
        if let Some(error) = error {
            self.own = Some((alone(&error), 0));
            self.drain_for = DRAIN;
        }
    }

    /// Writes what is left of an answer of our own.
    fn poll_own(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((answer, written)) = &mut self.own {
            let count = ready!(Pin::new(&mut self.socket).poll_write(cx, &answer[*written..]))?;
            *written += count;
            if *written >= answer.len() || count == 0 {
                self.own = None;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Says that no more comes, and reads on for a moment: a socket that is closed with bytes unread is reset, and the client
    /// may lose the answer.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_own(cx))?;
        let until = match self.drain_until {
            Some(until) => until,
            None => {
                ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
                *self.drain_until.insert(Instant::now() + self.drain_for)
            }
        };
        let mut room = [0; 4096];
        for _ in 0..8 {
            let mut room = ReadBuf::new(&mut room);
            match Pin::new(&mut self.socket).poll_read(cx, &mut room) {
                Poll::Ready(Ok(())) if !room.filled().is_empty() => {}
                Poll::Ready(result) => return Poll::Ready(result),
                Poll::Pending => return self.poll_deadline(cx, until).map(Ok),
            }
        }
        // Others have their turn first.
        cx.waker().wake_by_ref();
        self.poll_deadline(cx, until).map(Ok)
    }
}

impl AsyncRead for Connection {
    /// Hands on one request at a time: the server would take apart whatever it's given, and keep the requests until their turn.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let phase = this.state.phase.get();
            match phase {
                Phase::Refused => return this.poll_drain(cx),
                Phase::Answering | Phase::Answered => {
                    this.state.keep_reader(cx);
                    this.state.is_held.set(true);
                    return Poll::Pending;
                }
                Phase::Receiving if this.state.body_left.get() == Some(0) => {
                    this.state.received();
                    continue;
                }
                // It reads on as long as there's something, before it looks at what it has.
                _ if this.state.is_paused.take() => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Phase::Head if this.state.read.get() >= this.limits.head_bytes => {
                    this.refuse(Some(Error::HeadTooLarge));
                    continue;
                }
                _ => {}
            }
            if let Poll::Ready(result) = this.poll_next(cx, buf) {
                return Poll::Ready(result);
            }
            let since = this.state.since.get();
            let (deadline, late) = match phase {
                Phase::Idle => (since + this.limits.idle, None),
                Phase::Head => (since + this.limits.head, Some(Error::SlowHead)),
                _ => return Poll::Pending,
            };
            // For whoever ends a connection that has been idle for long.
            this.state.keep_reader(cx);
            ready!(this.poll_deadline(cx, deadline));
            this.refuse(late);
        }
    }
}

impl Connection {
    /// Reads what belongs to the request that is read: up to the end of its head, or of its body. What came with it is kept.
    fn poll_next(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        /// Where only the server knows the end of a body, it may find so much of the next requests before it.
        const PIECE: usize = 1024;
        let before = buf.filled().len();
        let is_ahead = !self.ahead.is_empty();
        if is_ahead {
            buf.put_slice(&self.ahead[..self.ahead.len().min(buf.remaining())]);
        } else {
            ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        }
        let new = &buf.filled()[before..];
        let state = &self.state;
        let wanted = match (state.phase.get(), state.body_left.get()) {
            (Phase::Receiving, Some(left)) => {
                let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(new.len());
                state.body_left.set(Some(left - wanted as u64));
                wanted
            }
            (Phase::Receiving, None) => {
                state.is_paused.set(true);
                new.len().min(PIECE)
            }
            _ => {
                let end = self.head_end.find(new);
                state.is_paused.set(end.is_some());
                end.unwrap_or(new.len())
            }
        };
        if is_ahead {
            self.ahead.advance(wanted);
        } else {
            self.ahead.extend_from_slice(&new[wanted..]);
        }
        if self.ahead.is_empty() {
            // Nothing is kept for those who send one request after another.
            self.ahead = BytesMut::new();
        }
        buf.set_filled(before + wanted);
        if state.is_idle() && wanted > 0 {
            state.phase.set(Phase::Head);
            state.since.set(Instant::now());
        }
        state.read.set(state.read.get() + wanted);
        Poll::Ready(Ok(()))
    }
}

/// Finds the ends of heads: empty lines. A line may end without a carriage return (RFC 9112, section 2.2).
#[derive(Default)]
struct HeadEnd {
    /// Whether the last byte but a carriage return ended a line.
    is_at_start: bool,
}

impl HeadEnd {
    /// Returns how many of the bytes that follow go up to the end of a head, if they have one.
    fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        for (index, byte) in bytes.iter().enumerate() {
            match byte {
                b'\n' if self.is_at_start => {
                    self.is_at_start = false;
                    return Some(index + 1);
                }
                b'\n' => self.is_at_start = true,
                b'\r' => {}
                _ => self.is_at_start = false,
            }
        }
        None
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Before a request is in hand, the server answers by itself what it can't read. What it says has no body.
        if matches!(this.state.phase.get(), Phase::Idle | Phase::Head)
            && this.own.is_none()
            && buf.starts_with(b"HTTP/1.1 4")
        {
            this.refuse(Some(Error::MalformedRequest));
        }
        let progress = match this.state.phase.get() {
            Phase::Refused => this.poll_own(cx).map_ok(|()| buf.len()),
            _ => Pin::new(&mut this.socket).poll_write(cx, buf),
        };
        if progress.is_pending() {
            let stalled = this.state.stalled.get().unwrap_or_else(Instant::now);
            this.state.stalled.set(Some(stalled));
            ready!(this.poll_deadline(cx, stalled + this.limits.write));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        progress
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.socket).poll_flush(cx))?;
        this.state.stalled.set(None);
        this.state.taken.take();
        if let Some(writer) = this.state.writer.take() {
            writer.wake();
        }
        if this.state.phase.get() == Phase::Answered {
            if this.state.is_last.get() {
                this.drain_for = DRAIN;
                this.state.evict();
                return Poll::Ready(Ok(()));
            }
            this.state.since.set(Instant::now());
            this.state.enter(if this.ahead.is_empty() { Phase::Idle } else { Phase::Head });
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_drain(cx)
    }
}

/// An answer that needs no request, as bytes, after which the connection ends.
fn alone(error: &Error) -> Vec<u8> {
    let response: HttpResponse = error.error_response();
    let mut head = format!("HTTP/1.1 {}\r\nconnection: close\r\n", response.status());
    for (name, value) in response.headers() {
        head.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap_or_default()));
    }
    let body = response.into_body().try_into_bytes().unwrap_or_default();
    head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    [head.as_bytes(), &body].concat()
}

/// How many connections there are from each address, of all workers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Addresses {
    fn update<T>(&self, address: IpAddr, change: impl FnOnce(&mut usize) -> T) -> T {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        let result = change(count);
        if *count == 0 {
            counts.remove(&address);
        }
        result
    }
}

/// The connections of one worker.
pub(crate) struct Connections {
    limits: Rc<Limits>,
    addresses: Addresses,
    present: Rc<RefCell<Present>>,
    turned_away: Rc<()>,
}

#[derive(Default)]
struct Present {
    states: BTreeMap<u64, Weak<State>>,
    next: u64,
}

/// A connection's place among those that there may be.
struct Place {
    present: Rc<RefCell<Present>>,
    number: u64,
    counted: Option<(Addresses, IpAddr)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.present.borrow_mut().states.remove(&self.number);
        if let Some((addresses, address)) = &self.counted {
            addresses.update(*address, |count| *count -= 1);
        }
    }
}

impl Connections {
    pub(crate) fn new(limits: Limits, addresses: Addresses) -> Self {
        Self { limits: Rc::new(limits), addresses, present: Rc::default(), turned_away: Rc::default() }
    }

    /// Takes a connection in, unless there are too many: then it's told so, and closed. `address` is whose it is, where that
    /// counts.
    pub(crate) fn admit(&self, socket: TcpStream, address: Option<IpAddr>) -> Option<Connection> {
        let within = address.is_none_or(|address| {
            self.addresses.update(address, |count| {
                let within = *count < self.limits.per_address;
                *count += usize::from(within);
                within
            })
        });
        let counted = address.filter(|_| within).map(|address| (self.addresses.clone(), address));
        let mut present = self.present.borrow_mut();
        let number = present.next;
        present.next += 1;
        let state = Rc::new(State::new());
        let has_room = within && (present.states.len() < self.limits.connections || present.evict());
        present.states.insert(number, Rc::downgrade(&state));
        drop(present);
        let place = Place { present: self.present.clone(), number, counted };
        if !has_room {
            self.turn_away(socket);
            return None;
        }
        let deadline = state.since.get() + self.limits.idle.min(self.limits.head);
        Some(Connection {
            socket,
            state,
            limits: self.limits.clone(),
            timer: Box::pin(sleep_until(deadline)),
            ahead: BytesMut::new(),
            head_end: HeadEnd::default(),
            own: None,
            drain_for: Duration::ZERO,
            drain_until: None,
            _place: place,
        })
    }

    /// Tells a client that there are too many, unless there are too many of those, too.
    fn turn_away(&self, socket: TcpStream) {
        const AT_ONCE: usize = 64;
        let count = self.turned_away.clone();
        if Rc::strong_count(&count) > AT_ONCE {
            return;
        }
        spawn(async move {
            let _count = count;
            let _ = timeout(DRAIN, tell_and_drain(socket)).await;
        });
    }
}

async fn tell_and_drain(mut socket: TcpStream) -> io::Result<()> {
    let mut room = [0; 4096];
    socket.write_all(&alone(&Error::TooManyConnections)).await?;
    socket.shutdown().await?;
    while socket.read(&mut room).await? > 0 {}
    Ok(())
}

impl Present {
    /// Ends the connection that has been idle for the longest time; tells whether there's one.
    fn evict(&mut self) -> bool {
        let idle = self.states.values().filter_map(Weak::upgrade).filter(|state| state.is_idle());
        match idle.min_by_key(|state| state.since.get()) {
            Some(state) => {
                state.evict();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::HeadEnd;

    #[test]
    fn a_head_ends_with_an_empty_line_wherever_it_is_cut() {
        for (text, ends) in [
            ("GET / HTTP/1.1\r\nA: b\r\n\r\n", &[24][..]),
            ("GET / HTTP/1.1\nA: b\n\nGET", &[21]),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\nx", &[4, 22]),
            ("GET / HTTP/1.1\r\n\rx\n", &[]),
        ] {
            for size in 1..=text.len() {
                let (mut found, mut end, mut at) = (Vec::new(), HeadEnd::default(), 0);
                for piece in text.as_bytes().chunks(size) {
                    let mut rest = piece;
                    while let Some(count) = end.find(rest) {
                        at += count;
                        found.push(at);
                        rest = &rest[count..];
                    }
                    at += rest.len();
                }
                assert_eq!(found, ends, "{text:?} in pieces of {size}");
            }
        }
    }
}
