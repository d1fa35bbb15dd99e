use crate::{
    eventually_within,
    private::{Folder, Frozen, Server, as_user, free_ports, signal},
};
use rustix::process::{Signal, geteuid};
use settings::Secret;
use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};
use storage::{Database, Settings};
use uuid::Uuid;

const USER: &str = "murmuration";

/// A PostgreSQL server of a test's own, which it may kill and freeze. Gone with the value, with its data.
pub struct PrivatePostgres {
    server: Option<Server>,
    folder: Folder,
    /// Where its data is, in the folder.
    data: &'static str,
    port: u16,
    password: String,
}

/// The folder of a standby's data.
const STANDBY: &str = "standby";

impl PrivatePostgres {
    /// An empty server, which doesn't run yet.
    ///
    /// # Panics
    /// When PostgreSQL isn't installed.
    #[expect(clippy::new_without_default, reason = "making a server is no default")]
    pub fn new() -> Self {
        let folder = Folder::new("postgres");
        let password = Uuid::new_v4().simple().to_string();
        // Root's server belongs to another user, who then has to own the folder of the data, and to read the password.
        if geteuid().is_root() {
            let given = Command::new("chown").arg("postgres:").arg(folder.path()).status();
            assert!(given.is_ok_and(|status| status.success()), "the folder can't be given to the user postgres");
        }
        let script = "umask 077 && cat >\"$1.password\" && exec \"$0\" --pgdata=\"$1\" --pwfile=\"$1.password\" \
                      --username=\"$2\" --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync";
        let mut child = as_user("postgres", "sh")
            .args(["-c", script])
            .arg(binaries().join("initdb"))
            .arg(folder.path().join("data"))
            .arg(USER)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a shell");
        child.stdin.take().expect("it's piped").write_all(password.as_bytes()).expect("the shell reads");
        let output = child.wait_with_output().expect("initdb ends");
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        let [port] = free_ports();
        Self { server: None, folder, data: "data", port, password }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}/postgres", self.password, self.port)
    }

    /// Starts it if it doesn't run.
    fn launch(&mut self) {
        if self.server.is_none() {
            let mut command = as_user("postgres", binaries().join("postgres"));
            command.arg("-D").arg(self.folder.path().join(self.data));
            let port = self.port.to_string();
            for (name, value) in [
                ("port", port.as_str()),
                ("listen_addresses", "127.0.0.1"),
                ("unix_socket_directories", ""),
                ("max_connections", "200"),
                ("shared_buffers", "32MB"),
                ("checkpoint_timeout", "1h"),
                ("lc_messages", "C"),
            ] {
                command.arg("-c").arg(format!("{name}={value}"));
            }
            // At once, and its other processes with it, even where all of them are frozen.
            self.server = Some(Server::start(&command, &self.folder, &["QUIT", "CONT"]));
        }
    }

    /// Starts it if it doesn't run, and awaits that it answers.
    ///
    /// # Panics
    /// When it doesn't.
    pub fn start(&mut self) {
        self.launch();
        let database = self.database();
        eventually_within(Duration::from_secs(60), "the private Postgres answers", || {
            let runs = self.server.as_ref().is_some_and(Server::runs);
            assert!(runs, "the private Postgres has ended:\n{}", self.folder.output());
            database.ping().ok()
        });
    }

    fn database(&self) -> Database {
        let settings = Settings {
            url: Secret::from(self.url()),
            schema: "public".into(),
            pool_size: 1,
            connect_timeout_ms: 1000,
            statement_timeout_ms: 60_000,
            lock_timeout_ms: 10_000,
            call_timeout_ms: 60_000,
        };
        Database::open(&settings, "harness").expect("a usable URL")
    }

    /// Keeps what it has by now aside, as a standby that gets no further, and starts it again.
    ///
    /// # Panics
    /// When that can't be done.
    pub fn leave_standby_behind(&mut self) {
        self.stop();
        let script = r#"rm -rf "$0/$2" && cp -a "$0/$1" "$0/$2" && touch "$0/$2/standby.signal""#;
        let copied =
            as_user("postgres", "sh").args(["-c", script]).arg(self.folder.path()).args([self.data, STANDBY]).status();
        assert!(copied.is_ok_and(|status| status.success()), "the data can't be copied");
        self.start();
    }

    /// Kills it, and has the standby take its place and be promoted: whatever was committed since it was left behind is gone.
    ///
    /// # Panics
    /// When there's none.
    pub fn fail_over(&mut self) {
        self.kill();
        self.data = STANDBY;
        self.launch();
        // It refuses sessions of the fleet until then.
        let mut promote = as_user("postgres", binaries().join("pg_ctl"));
        promote.args(["promote", "--pgdata"]).arg(self.folder.path().join(self.data)).current_dir("/");
        promote.stdout(Stdio::null()).stderr(Stdio::null());
        let mut is_promoted = || promote.status().is_ok_and(|status| status.success());
        eventually_within(Duration::from_secs(60), "the standby is promoted", || is_promoted().then_some(()));
        self.start();
    }

    /// Ends it as a power failure does. Nothing happens if it doesn't run.
    pub fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
    }

    /// Ends it as an operator does: sessions end, what is committed is in its place.
    ///
    /// # Panics
    /// When it doesn't end.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            signal(server.pid(), Signal::INT);
            eventually_within(Duration::from_secs(60), "the private Postgres ends", || (!server.runs()).then_some(()));
        }
    }

    /// Stops its processes, which keep their connections.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn freeze(&self) -> Frozen {
        self.server.as_ref().expect("the private Postgres runs").freeze()
    }
}

/// The newest that are installed; Debian keeps them outside the path.
fn binaries() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |entry: &fs::DirEntry| entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
    let newest = versions.filter(|entry| version(entry).is_some()).max_by_key(version);
    newest.expect("PostgreSQL is installed: run `make servers` first").path().join("bin")
}
