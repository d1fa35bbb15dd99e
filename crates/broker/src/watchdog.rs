use std::{
    net::{Shutdown, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::Error;

/// Holds a second handle on a connection's socket and cuts it when a call takes too long: the client itself waits for
/// ever on a broker that is frozen or blocked, and returns from anything within milliseconds once the socket is cut.
pub(crate) struct Watchdog {
    socket: TcpStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// When the call that is under way has to be over.
    deadline: Option<Instant>,
    /// When the thread looks again by itself.
    wakes: Option<Instant>,
    /// A deadline has passed.
    expired: bool,
    ended: bool,
}

impl Watchdog {
    /// Starts the thread; it lives until [`Watchdog::end`].
    pub(crate) fn start(socket: TcpStream) -> std::io::Result<Arc<Self>> {
        let watchdog = Arc::new(Self { socket, state: Mutex::default(), changed: Condvar::new() });
        let watching = Arc::clone(&watchdog);
        thread::Builder::new().name("broker-watchdog".into()).spawn(move || watching.watch())?;
        Ok(watchdog)
    }

    /// Runs a call of the client and cuts the connection if it isn't over within `limit`.
    pub(crate) fn bounded<T>(
        &self,
        doing: &'static str,
        limit: Duration,
        call: impl FnOnce() -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        self.arm(Some(Instant::now() + limit));
        let result = call();
        let expired = self.arm(None);
        result.map_err(|error| match expired {
            true => Error::TimedOut { doing, after: limit },
            false => Error::from_client(doing, error),
        })
    }

    /// Cuts the connection.
    pub(crate) fn abort(&self) {
        // It fails if the connection is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_one();
    }

    /// Sets the deadline, and says whether one has passed on this connection. Calls are frequent, so the thread is
    /// woken only if it would sleep through the deadline, which is about once per limit.
    fn arm(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.lock();
        state.deadline = deadline;
        if let Some(deadline) = deadline
            && state.wakes.is_none_or(|wakes| wakes > deadline)
        {
            self.changed.notify_one();
        }
        state.expired
    }

    fn watch(&self) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            if state.deadline.is_some_and(|deadline| deadline <= now) {
                state.deadline = None;
                state.expired = true;
                self.abort();
            }
            state.wakes = state.deadline;
            state = match state.deadline {
                Some(deadline) => {
                    let woken = self.changed.wait_timeout(state, deadline - now);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    // Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, net::TcpListener};

    /// Both ends of a connection on which nobody says anything.
    fn silent_connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn a_call_that_takes_too_long_has_its_connection_cut() {
        let (mut client, _server) = silent_connection();
        let watchdog = Watchdog::start(client.try_clone().unwrap()).unwrap();
        let limit = Duration::from_secs(2);
        // Calls that end in time leave the connection alone, however soon the next one comes.
        for _ in 0..1000 {
            watchdog.bounded("trying", limit, || Ok(())).unwrap();
        }
        let started = Instant::now();
        let result = watchdog.bounded("reading", limit, || {
            let read = client.read(&mut [0]).unwrap();
            assert_eq!(read, 0, "nobody wrote anything");
            Err::<(), _>(amiquip::Error::UnexpectedSocketClose)
        });
        assert!(matches!(result, Err(Error::TimedOut { doing: "reading", .. })), "{result:?}");
        assert!(started.elapsed() >= limit);
        watchdog.end();
    }

    #[test]
    fn a_shorter_limit_counts_though_the_last_one_was_longer() {
        let (mut client, _server) = silent_connection();
        let watchdog = Watchdog::start(client.try_clone().unwrap()).unwrap();
        watchdog.bounded("trying", Duration::from_secs(60), || Ok(())).unwrap();
        let started = Instant::now();
        let read = || {
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "nobody wrote anything");
            Err::<(), _>(amiquip::Error::UnexpectedSocketClose)
        };
        watchdog.bounded("reading", Duration::from_millis(50), read).unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(10), "took {:?}", started.elapsed());
        watchdog.end();
    }
}
