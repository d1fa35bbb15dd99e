//! The gateway, within the test's process.

use actix_web::{dev::ServerHandle, rt::System};
use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};
use test_support::TestDatabase;

/// Serves until it's dropped.
pub(crate) struct Gateway {
    pub(crate) url: String,
    server: ServerHandle,
    serving: Option<JoinHandle<()>>,
}

impl Gateway {
    pub(crate) fn serve(database: &TestDatabase, settings: &[(&str, &str)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let own = [
            ("MURMURATION__DATABASE__URL", database.url()),
            // However slow a busy machine is, nothing of that is a gateway's refusal.
            ("MURMURATION__DATABASE__CONNECT_TIMEOUT_MS", "30000"),
            ("MURMURATION__API_GATEWAY__REQUEST_TIMEOUT_MS", "60000"),
        ];
        let variables = [&own, settings].concat();
        let settings: api_gateway::Settings = settings::load_from("api-gateway", variables).unwrap();
        let (sender, receiver) = mpsc::channel();
        let serving = thread::spawn(move || {
            System::new().block_on(async {
                let server = api_gateway::serve(listener, settings).unwrap();
                sender.send(server.handle()).unwrap();
                server.await.unwrap();
            });
        });
        Self { url, server: receiver.recv().unwrap(), serving: Some(serving) }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        System::new().block_on(self.server.stop(true));
        let ended = self.serving.take().map(JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || thread::panicking(), "the gateway died");
    }
}

/// What a [`Loser`] hangs up on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The gateway never sees them.
    Requests,
    /// The gateway has done what was asked.
    Answers,
}

/// Passes requests on to the gateway and answers back, but for the first few: there it hangs up.
pub(crate) struct Loser {
    pub(crate) url: String,
    left: Arc<AtomicUsize>,
    count: usize,
}

impl Loser {
    pub(crate) fn start(gateway: &Gateway, lost: Lost, count: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let upstream = gateway.url.strip_prefix("http://").unwrap().to_owned();
        let left = Arc::new(AtomicUsize::new(count));
        let counter = left.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(&upstream).unwrap();
                for (from, to, loses) in
                    [(&client, &server, lost == Lost::Requests), (&server, &client, lost == Lost::Answers)]
                {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let counter = counter.clone();
                    thread::spawn(move || Self::pass_on(from, to, loses.then_some(&*counter)));
                }
            }
        });
        Self { url, left, count }
    }

    /// How many it has hung up on.
    pub(crate) fn lost(&self) -> usize {
        self.count - self.left.load(Ordering::SeqCst)
    }

    fn pass_on(mut from: TcpStream, mut to: TcpStream, left_to_lose: Option<&AtomicUsize>) {
        let mut buffer = [0; 16 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let one_less = |left: usize| left.checked_sub(1);
            let loses = left_to_lose
                .is_some_and(|left| left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok());
            if loses || to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        // Whichever side goes away first, the other is told.
        for end in [from, to] {
            let _: io::Result<()> = end.shutdown(Shutdown::Both);
        }
    }
}
