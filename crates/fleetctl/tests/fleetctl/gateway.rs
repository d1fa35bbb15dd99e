//! The gateway, within the test's process.

use actix_web::{dev::ServerHandle, rt::System};
use std::{
    net::TcpListener,
    sync::mpsc,
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
        let variables = [&[("MURMURATION__DATABASE__URL", database.url())], settings].concat();
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
