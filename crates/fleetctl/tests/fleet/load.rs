//! Clients that post, follow, unfollow and import at random, and know what was accepted.

use crate::{
    api::{Answer, Api, number},
    stage::{PATIENCE, PRIVATE, Stage},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use test_support::eventually_within;

const AUTHORS: usize = 3;
const READERS: usize = 30;
/// Bounds of each client's work.
const REQUESTS: usize = 30_000;
const IMPORTS: usize = 3;
const IMPORTED: usize = 25;

pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Accepted>>,
}

/// What the gateway has said that it did.
#[derive(Default)]
pub(crate) struct Accepted {
    tweets: Vec<i64>,
    /// Whether the reader follows the author, by author and reader.
    follows: BTreeMap<(i64, i64), bool>,
    imports: Vec<i64>,
    /// How often which status came, 0 standing for no answer.
    statuses: BTreeMap<u16, usize>,
}

impl Load {
    /// Makes authors and readers, and lets a client for each author loose.
    pub(crate) fn start(stage: &Stage, seed: u64) -> Self {
        let readers: Vec<_> = (0..READERS)
            .map(|n| match n % 2 {
                0 => stage.api.reader_by_email(&format!("reader{n}")),
                _ => stage.api.reader_by_phone(&format!("reader{n}"), n),
            })
            .collect();
        let (stop, accepted) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let clients = (0..AUTHORS).map(|n| {
            let author = stage.api.reader_by_email(&format!("author{n}"));
            let client = Client {
                api: Api::new(stage.fleet.gateway_url()),
                author,
                readers: readers.clone(),
                random: StdRng::seed_from_u64(seed * 100 + n as u64),
                count: accepted.clone(),
                accepted: Accepted::default(),
            };
            let stop = stop.clone();
            thread::spawn(move || client.run(&stop))
        });
        Self { clients: clients.collect(), stop, accepted }
    }

    /// Awaits that so many more requests are accepted.
    #[track_caller]
    pub(crate) fn await_more(&self, count: usize) {
        let accepted = || self.accepted.load(Ordering::Relaxed);
        let enough = accepted() + count;
        eventually_within(PATIENCE, "requests are accepted", || {
            assert!(!self.clients.iter().any(JoinHandle::is_finished), "a client has ended early");
            (accepted() >= enough).then_some(())
        });
    }

    pub(crate) fn stop(self) -> Accepted {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Accepted::default();
        for client in self.clients {
            let Accepted { tweets, follows, imports, statuses } = client.join().expect("a client's own end");
            all.tweets.extend(tweets);
            all.follows.extend(follows);
            all.imports.extend(imports);
            for (status, count) in statuses {
                *all.statuses.entry(status).or_default() += count;
            }
        }
        all
    }
}

impl Accepted {
    /// Checks that each request was answered, and with none but these statuses.
    #[track_caller]
    pub(crate) fn has_only(&self, statuses: &[u16]) {
        assert!(self.statuses.keys().all(|status| statuses.contains(status)), "{:?}", self.statuses);
    }

    /// Checks that everything has taken place. To be asked when the fleet is at rest.
    pub(crate) fn is_all_there(&self, stage: &Stage) {
        eprintln!("{} tweets, {} imports, answers {:?}", self.tweets.len(), self.imports.len(), self.statuses);
        let list = |ids: &[i64]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let count = |sql: String| usize::try_from(stage.database.count(&sql)).expect("a count");
        let tweets = count(format!("SELECT count(*) AS n FROM tweet WHERE id = ANY ('{{{}}}')", list(&self.tweets)));
        assert_eq!(tweets, self.tweets.len(), "accepted tweets are there");
        let imports = count(format!(
            "SELECT count(*) AS n FROM follower_import i WHERE id = ANY ('{{{}}}') AND state = 'done'
             AND created = {IMPORTED} AND created = (SELECT count(*) FROM subscription s
                 JOIN \"user\" u ON u.id = s.follower_id AND u.import_id = i.id WHERE s.author_id = i.author_id)",
            list(&self.imports)
        ));
        assert_eq!(imports, self.imports.len(), "accepted imports are done");
        for ((author, reader), follows) in &self.follows {
            let rows = count(format!(
                "SELECT count(*) AS n FROM subscription WHERE author_id = {author} AND follower_id = {reader}"
            ));
            assert_eq!(rows == 1, *follows, "reader {reader} follows author {author}");
        }
    }
}

struct Client {
    api: Api,
    /// Nobody else changes what this one does.
    author: i64,
    readers: Vec<i64>,
    random: StdRng,
    count: Arc<AtomicUsize>,
    accepted: Accepted,
}

impl Client {
    fn run(mut self, stop: &AtomicBool) -> Accepted {
        for request in 0..REQUESTS {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let reader = self.readers[self.random.random_range(0..READERS)];
            match self.random.random_range(0..100) {
                0..60 => self.post(request),
                60..80 => self.follow("POST", "create-subscription", reader, true),
                80..97 => self.follow("DELETE", "subscription", reader, false),
                _ => self.import(),
            }
            thread::sleep(Duration::from_millis(self.random.random_range(20..60)));
        }
        self.accepted
    }

    /// One request. `None` if whether it took place is unknown.
    fn call(&mut self, method: &str, path: &str, body: &Value) -> Option<Answer> {
        let answer = self.api.call(method, path, body).ok();
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        *self.accepted.statuses.entry(status).or_default() += 1;
        let accepted = (200..300).contains(&status);
        self.count.fetch_add(accepted.into(), Ordering::Relaxed);
        answer.filter(|answer| answer.status < 500)
    }

    fn post(&mut self, request: usize) {
        let by_workers = self.random.random_bool(0.8);
        let text = format!("tweet {request}, {PRIVATE}");
        let tweet = json!({"userId": self.author, "text": text, "async": by_workers});
        if let Some(answer) = self.call("POST", "/api/v1/post-tweet", &tweet) {
            assert_eq!(answer.status, 200, "{answer:?}");
            self.accepted.tweets.push(number(&answer.body["id"]));
        }
    }

    /// Follows or leaves, and goes on asking until the answer is known.
    fn follow(&mut self, method: &str, what: &str, reader: i64, follows: bool) {
        let path = format!("/api/v1/{what}/{}/{reader}", self.author);
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = self.call(method, &path, &Value::Null) {
                let unknown_subscription = answer.status == 404 && !follows;
                assert!(unknown_subscription || answer.status < 300, "{answer:?}");
                self.accepted.follows.insert((self.author, reader), follows);
                return;
            }
            assert!(Instant::now() < end, "no answer for {PATIENCE:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn import(&mut self) {
        let number_of = self.accepted.imports.len();
        if number_of >= IMPORTS {
            return;
        }
        let order = json!({
            "followerLoginPrefix": format!("f{}_{}", self.author, self.random.random_range(0..u32::MAX)),
            "count": IMPORTED,
            "async": true,
        });
        if let Some(answer) = self.call("POST", &format!("/api/v1/add-followers/{}", self.author), &order) {
            assert_eq!(answer.status, 200, "{answer:?}");
            self.accepted.imports.push(number(&answer.body["importId"]));
        }
    }
}
