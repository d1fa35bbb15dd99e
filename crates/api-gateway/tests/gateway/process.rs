//! The process itself: its log, its port, its end.

use crate::app::{agent, send};
use serde_json::json;
use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};
use test_support::{TestDatabase, eventually, sql};
use ureq::http::Method;

pub(crate) struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    base: String,
}

fn command(db: &TestDatabase, port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_api-gateway"));
    command
        .env("MURMURATION__DATABASE__URL", db.url())
        .env("MURMURATION__API_GATEWAY__PORT", port.to_string())
        .env("RUST_LOG", "info,api_gateway=trace,storage=trace,telemetry=trace")
        .stderr(Stdio::piped());
    command
}

impl Process {
    fn start(db: &TestDatabase) -> Self {
        Self::start_with(db, &[])
    }

    pub(crate) fn start_with(db: &TestDatabase, variables: &[(&str, &str)]) -> Self {
        let mut child = command(db, 0).envs(variables.iter().copied()).spawn().unwrap();
        let (log, stderr) = (Arc::<Mutex<String>>::default(), child.stderr.take().unwrap());
        let written = log.clone();
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                let mut log = written.lock().unwrap();
                log.push_str(&line.unwrap());
                log.push('\n');
            }
        });
        let address = eventually("the gateway says where it listens", || {
            let log = log.lock().unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it has ended: {log}");
            let (_, rest) = log.split_once("listening address=")?;
            Some(rest.lines().next()?.to_owned())
        });
        Self { child, log, reader: Some(reader), base: format!("http://{address}") }
    }

    fn post(&self, path: &str, body: &serde_json::Value) -> u16 {
        let headers = [("content-type", "application/json"), ("x-correlation-id", "told-by-the-client")];
        let url = format!("{}{path}", self.base);
        send(&agent(), Method::POST, &url, &headers, Some(body.to_string().as_bytes())).status
    }

    fn get(&self, path: &str) -> u16 {
        send(&agent(), Method::GET, &format!("{}{path}", self.base), &[], None).status
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.base.trim_start_matches("http://").parse().unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn terminate(&self) {
        let killed = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
    }

    /// Awaits the end, and returns the exit code and the whole log.
    fn end(&mut self) -> (Option<i32>, String) {
        let status = eventually("the process ends", || self.child.try_wait().unwrap());
        self.reader.take().unwrap().join().unwrap();
        (status.code(), std::mem::take(&mut self.log.lock().unwrap()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail where the test has ended it already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_log_has_a_line_for_each_request_and_nothing_personal() {
    let db = TestDatabase::new();
    let mut process = Process::start(&db);
    let user = json!({"login": "annlogin", "email": "annmail@example.com", "password": "annpassword"});
    assert_eq!(process.post("/api/v2/user", &user), 201);
    assert_eq!(process.post("/api/v2/user", &user), 409);
    assert_eq!(
        process.post("/api/v2/user", &json!({"login": "annlogin", "email": "annmail", "phone": "+1annphone"})),
        400
    );
    assert_eq!(process.post("/api/v1/post-tweet", &json!({"userId": 1, "text": "anntweet"})), 200);
    assert_eq!(process.post("/api/v1/message", &json!({"text": "anntext", "key": "annkey"})), 200);
    assert_eq!(process.post("/api/v1/message", &json!({"text": "anntext", "key": "annkey", "partition": 9})), 400);
    assert_eq!(process.get("/api/v1/get-user-by-login/annlogin"), 200);
    assert_eq!(process.get("/api/v1/user?id=1&anni=annquery"), 400);
    assert_eq!(process.get("/annpath"), 404);
    db.execute("ALTER TABLE tweet RENAME TO hidden");
    assert_eq!(process.post("/api/v1/post-tweet", &json!({"userId": 1, "text": "anntweet"})), 500);
    process.terminate();
    let (code, log) = process.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("ann"), "{log}");
    let lines: Vec<_> = log.lines().filter(|line| line.contains("answered a request")).collect();
    assert_eq!(lines.len(), 10, "{log}");
    assert!(lines[0].contains("method=POST route=/api/v2/user status=201"), "{log}");
    assert!(lines[0].contains("correlation_id=told-by-the-client"), "{log}");
    // What the client isn't told is here.
    let failed: Vec<_> = log.lines().filter(|line| line.contains("a request failed")).collect();
    assert_eq!(failed.len(), 1, "{log}");
    assert!(failed[0].contains("does not exist") && failed[0].contains("told-by-the-client"), "{log}");
}

#[test]
fn a_gateway_that_is_told_to_stop_answers_the_request_in_hand_first() {
    let db = TestDatabase::new();
    // So long may the request wait here.
    let mut process = Process::start_with(
        &db,
        &[
            ("MURMURATION__API_GATEWAY__LONG_REQUEST_TIMEOUT_MS", "300000"),
            ("MURMURATION__API_GATEWAY__STOP_GRACE_MS", "300000"),
            ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "300000"),
            ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "400000"),
        ],
    );
    assert_eq!(process.post("/api/v1/user", &json!({"login": "ann", "email": "ann@example.com"})), 201);
    let mut lock = db.database().connection().unwrap();
    sql::execute(&mut lock, "BEGIN").unwrap();
    sql::execute(&mut lock, "LOCK TABLE tweet IN EXCLUSIVE MODE").unwrap();
    thread::scope(|scope| {
        let answer = scope.spawn(|| process.post("/api/v1/post-tweet", &json!({"userId": 1, "text": "hello"})));
        let waiting = "SELECT count(*) AS n FROM pg_stat_activity
                       WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("the request waits for the lock", || (db.count(waiting) == 1).then_some(()));
        process.terminate();
        eventually("the gateway heeds the signal", || {
            process.log.lock().unwrap().contains("SIGTERM received").then_some(())
        });
        sql::execute(&mut lock, "ROLLBACK").unwrap();
        assert_eq!(answer.join().unwrap(), 200);
    });
    let (code, log) = process.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(db.count("SELECT count(*) AS n FROM tweet"), 1);
}

#[test]
fn a_gateway_that_is_told_to_stop_doesnt_wait_for_a_database_that_hangs() {
    let db = TestDatabase::new();
    let mut process = Process::start_with(
        &db,
        &[
            // For the request to arrive, and then for its answer.
            ("MURMURATION__API_GATEWAY__REQUEST_TIMEOUT_MS", "2000"),
            // Whoever waits for any of these waits too long.
            ("MURMURATION__API_GATEWAY__STOP_GRACE_MS", "600000"),
            ("MURMURATION__DATABASE__STATEMENT_TIMEOUT_MS", "600000"),
            ("MURMURATION__DATABASE__CALL_TIMEOUT_MS", "700000"),
        ],
    );
    db.execute(r#"INSERT INTO "user" (login, channel, email) VALUES ('ann', 'email', 'ann@example.com')"#);
    let mut lock = db.database().connection().unwrap();
    sql::execute(&mut lock, "BEGIN").unwrap();
    sql::execute(&mut lock, "LOCK TABLE tweet IN EXCLUSIVE MODE").unwrap();
    assert_eq!(process.post("/api/v1/post-tweet", &json!({"userId": 1, "text": "hello", "async": true})), 503);
    process.terminate();
    assert_eq!(process.end().0, Some(0));
}

#[test]
fn a_port_that_is_taken_is_named_and_the_process_fails() {
    let db = TestDatabase::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut child = command(&db, port).spawn().unwrap();
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(message.contains(&format!("can't listen on 127.0.0.1:{port}: Address already in use")), "{message}");
}
