//! A TCP proxy that misbehaves when it's told to: what networks, firewalls and slow servers do to connections.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    ToServer,
    /// From the server to the client.
    ToClient,
}

/// What happens when a [trap](Proxy::trap) springs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The connection is cut there: nothing behind the place arrives.
    Cut,
    /// Everything arrives, and the connection is cut as soon as the other side answers: the answer is lost. For protocols
    /// that answer each request before the next one is sent, such as PostgreSQL's.
    CutAnswer,
    /// From there on nothing goes that way on this connection, which stays open, until the trap is dropped.
    Hold,
}

/// Finds, in bytes that go one way, the place at which a trap springs.
type Place = Box<dyn FnMut(&[u8]) -> Option<usize> + Send>;

/// The place behind the first occurrence of `pattern`.
pub fn after(pattern: impl Into<Vec<u8>>) -> impl FnMut(&[u8]) -> Option<usize> + Send + 'static {
    let pattern = pattern.into();
    move |bytes| bytes.windows(pattern.len()).position(|window| window == pattern).map(|at| at + pattern.len())
}

/// A proxy in front of a server of this machine. It passes everything on, at once, until it's told otherwise; ends with
/// the value, and so do its connections.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How many want each direction held: to the server, to the client.
    held: [usize; 2],
    delay: [Duration; 2],
    refusing: usize,
    ended: bool,
    traps: Vec<Armed>,
    connections: HashMap<u64, Pair>,
    opened: u64,
}

/// A connection's two sockets.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    /// What a trap does to the bytes that come next, each way.
    next: [Option<(Action, Arc<Signs>)>; 2],
}

/// What a trap and whoever set it share.
#[derive(Default)]
struct Signs {
    sprung: AtomicBool,
    dropped: AtomicBool,
}

struct Armed {
    direction: Direction,
    place: Place,
    action: Action,
    signs: Arc<Signs>,
}

impl Direction {
    fn other(self) -> Self {
        match self {
            Self::ToServer => Self::ToClient,
            Self::ToClient => Self::ToServer,
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

impl Pair {
    fn cut(&self) {
        // An error means that it's closed already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

impl Proxy {
    /// A proxy of the server that listens on this port of 127.0.0.1, or will.
    ///
    /// # Panics
    /// When no port can be listened on.
    pub fn to(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port of the loopback interface");
        let port = listener.local_addr().expect("it listens").port();
        let shared = Arc::<Shared>::default();
        let accepting = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = accepting.lock();
                if state.ended {
                    return;
                }
                let refusing = state.refusing > 0;
                drop(state);
                if !refusing && let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)) {
                    accepting.join(client, server);
                }
            }
        });
        Self { port, shared }
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A proxy of the server of this URL, and the URL by way of it.
    ///
    /// # Panics
    /// When the URL has no port of 127.0.0.1.
    pub fn of(url: &str) -> (Self, String) {
        const HOST: &str = "127.0.0.1:";
        let (before, behind) = url.rsplit_once(HOST).expect("a server of this machine");
        let digits = behind.bytes().take_while(u8::is_ascii_digit).count();
        let proxy = Self::to(behind[..digits].parse().expect("a port"));
        let url = format!("{before}{HOST}{}{}", proxy.port, &behind[digits..]);
        (proxy, url)
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// Cuts all connections, and returns how many there were.
    pub fn cut(&self) -> usize {
        let state = self.shared.lock();
        state.connections.values().for_each(Pair::cut);
        state.connections.len()
    }

    /// From now on every piece that goes this way is as late as that.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.shared.change(|state| state.delay[direction as usize] = delay);
    }

    /// Holds back everything that goes this way, on all connections, until the value is dropped.
    pub fn hold(&self, direction: Direction) -> Held {
        self.shared.change(|state| state.held[direction as usize] += 1);
        Held { shared: self.shared.clone(), undo: Box::new(move |state| state.held[direction as usize] -= 1) }
    }

    /// Closes new connections at once, until the value is dropped.
    pub fn refuse(&self) -> Held {
        self.shared.change(|state| state.refusing += 1);
        Held { shared: self.shared.clone(), undo: Box::new(|state| state.refusing -= 1) }
    }

    /// Does something once, on the first connection on which `place` finds a place in what goes this way. It's given the bytes
    /// that have just come, behind up to 256 of those before, and says how many of them are before the place: see [`after`].
    pub fn trap(
        &self,
        direction: Direction,
        place: impl FnMut(&[u8]) -> Option<usize> + Send + 'static,
        action: Action,
    ) -> Trap {
        let signs = Arc::<Signs>::default();
        let armed = Armed { direction, place: Box::new(place), action, signs: signs.clone() };
        self.shared.change(|state| state.traps.push(armed));
        Trap { shared: self.shared.clone(), signs }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.ended = true;
            state.connections.drain().for_each(|(_, pair)| pair.cut());
        });
        // It looks at each new connection whether to go on.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// While it lives, the proxy misbehaves.
#[must_use]
pub struct Held {
    shared: Arc<Shared>,
    undo: Box<dyn Fn(&mut State) + Send>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.change(|state| (self.undo)(state));
    }
}

/// Something that the proxy does once; disarmed, or released, when it's dropped.
#[must_use]
pub struct Trap {
    shared: Arc<Shared>,
    signs: Arc<Signs>,
}

impl Trap {
    /// Whether it has happened.
    pub fn sprung(&self) -> bool {
        self.signs.sprung.load(Ordering::Acquire)
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.shared.change(|state| {
            self.signs.dropped.store(true, Ordering::Release);
            state.traps.retain(|trap| !Arc::ptr_eq(&trap.signs, &self.signs));
        });
    }
}

/// How much of what has gone by traps still see.
const RECENT: usize = 256;

impl Shared {
    fn join(self: &Arc<Self>, client: TcpStream, server: TcpStream) {
        let sockets = |pair: &Pair| Some((pair.client.try_clone().ok()?, pair.server.try_clone().ok()?));
        let pair = Pair { client, server, next: [None, None] };
        let _ = pair.client.set_nodelay(true);
        let _ = pair.server.set_nodelay(true);
        let (Some((client, server)), Some((back_client, back_server))) = (sockets(&pair), sockets(&pair)) else {
            return;
        };
        let mut state = self.lock();
        state.opened += 1;
        let id = state.opened;
        state.connections.insert(id, pair);
        drop(state);
        for (direction, from, to) in
            [(Direction::ToServer, client, server), (Direction::ToClient, back_server, back_client)]
        {
            let shared = self.clone();
            thread::spawn(move || {
                shared.pump(id, direction, from, to);
                let ended = shared.lock().connections.remove(&id);
                ended.iter().for_each(Pair::cut);
                shared.changed.notify_all();
            });
        }
    }

    /// Passes on what comes, until either side closes.
    fn pump(&self, id: u64, direction: Direction, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 * 1024];
        let mut recent = Vec::new();
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let delay = self.lock().delay[direction as usize];
            if !delay.is_zero() {
                thread::sleep(delay);
            }
            let mut pass = |part: &[u8]| self.await_leave(id, direction) && to.write_all(part).is_ok();
            let mut rest = &bytes[..count];
            if let Some((at, action, signs)) = self.look(direction, &mut recent, rest) {
                let before;
                (before, rest) = rest.split_at(at);
                if !pass(before) {
                    return;
                }
                self.spring(id, direction, action, signs);
                if action == Action::Cut {
                    return;
                }
            }
            if !rest.is_empty() && !pass(rest) {
                return;
            }
        }
    }

    /// Finds a trap that springs within `bytes`, and how many of them are before that place.
    fn look(&self, direction: Direction, recent: &mut Vec<u8>, bytes: &[u8]) -> Option<(usize, Action, Arc<Signs>)> {
        let old = recent.len();
        recent.extend_from_slice(bytes);
        let mut state = self.lock();
        let sprung = state.traps.iter_mut().enumerate().find_map(|(index, trap)| {
            let at = if trap.direction == direction { (trap.place)(recent)? } else { return None };
            Some((index, at.saturating_sub(old).min(bytes.len())))
        });
        recent.drain(..recent.len().saturating_sub(RECENT));
        let (index, at) = sprung?;
        let Armed { action, signs, .. } = state.traps.swap_remove(index);
        // What has gone by isn't seen a second time.
        recent.clear();
        Some((at, action, signs))
    }

    /// Does what the trap is for, now or with the bytes that come next.
    fn spring(&self, id: u64, direction: Direction, action: Action, signs: Arc<Signs>) {
        let way = if action == Action::CutAnswer { direction.other() } else { direction };
        if action != Action::CutAnswer {
            signs.sprung.store(true, Ordering::Release);
        }
        if let Some(pair) = self.lock().connections.get_mut(&id) {
            pair.next[way as usize] = Some((action, signs));
        }
    }

    /// Waits while this direction is held; `false` if the connection is over.
    fn await_leave(&self, id: u64, direction: Direction) -> bool {
        let way = direction as usize;
        let mut state = self.lock();
        loop {
            let Some(pair) = state.connections.get(&id) else { return false };
            match &pair.next[way] {
                Some((Action::CutAnswer, signs)) => {
                    signs.sprung.store(true, Ordering::Release);
                    return false;
                }
                Some((Action::Hold, signs)) if !signs.dropped.load(Ordering::Acquire) => {}
                _ if state.held[way] == 0 => return true,
                _ => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
