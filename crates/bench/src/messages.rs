//! How fast the message log is recorded, and how soon.

use crate::{
    Messages,
    baseline::{self, Plain},
    context::Context,
    report::{Figure, Machine, Report, median, spread},
    stage::{Stage, finish, until},
};
use anyhow::{Context as _, ensure};
use chrono::{DateTime, Utc};
use command_line::{interrupt::Interrupt, progress::Progress};
use domain::log::{Group, MessageId};
use harness::Name;
use rustix::process::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Child,
    time::{Duration, Instant},
};
use storage::{
    PgConnection, leases, log_audit, message_audit,
    message_outbox::{self, New},
    messages::{self, Message, NewMessage, Pick},
    partitions,
};

const RELAY: &str = "outbox-relay";
const RECORDER: &str = "message-recorder";
const GROUP: &str = "MURMURATION__MESSAGE_RECORDER__GROUP";
const FROM: &str = "MURMURATION__MESSAGE_RECORDER__FROM";

/// How long a process may take to stop.
const STOPPED: Duration = Duration::from_secs(30);
/// Messages a second whose way to the record is timed.
const RATE: u32 = 1000;
/// Messages a second while a member is killed, and how many there are.
const TAKEOVER_RATE: u32 = 200;
const TAKEOVER_MESSAGES: u32 = 2000;
/// How many of them are recorded before.
const STEADY: i64 = 400;

pub(crate) fn measure(args: &Messages, context: &Context, interrupt: &Interrupt) -> anyhow::Result<Report> {
    let progress = Progress::waiting("bench messages");
    let begin = |what: &str| {
        progress.say(what);
        log::info!("{what}");
    };
    begin("setting up");
    let batch = context.settings.message_recorder.batch;
    let stage = Stage::new(&args.place, context)?;
    let mut bench = Bench { args, batch, stage, interrupt, figures: Vec::new() };
    begin("bringing the messages into their streams");
    bench.publish()?;
    begin("replaying them, and plain INSERTs of the same rows, in turn");
    bench.replays()?;
    for service in ["api-gateway", RELAY] {
        bench.stage.fleet.start(service, &[])?;
    }
    bench.stage.fleet.wait_ready(Duration::from_secs(60))?;
    begin("messages from the gateway to the record");
    bench.latencies()?;
    begin("members that are killed");
    bench.takeovers()?;
    let Bench { stage, figures, .. } = bench;
    let postgres = baseline::server_version(&mut *stage.connection()?)?;
    let at = Utc::now().format("%Y-%m-%d %H:%M UTC").to_string();
    Ok(Report { benchmark: "messages", at, machine: Machine::this(postgres), figures })
}

struct Bench<'a> {
    args: &'a Messages,
    /// The most messages that the recorder records in one transaction.
    batch: usize,
    stage: Stage,
    interrupt: &'a Interrupt,
    figures: Vec<Figure>,
}

/// One replay beside the same rows by plain statements.
struct Replay {
    /// Messages a second, from the start of the process.
    rate: f64,
    /// The same from the first one recorded.
    running: f64,
    /// Rows a second by plain statements with rows of values.
    rows: f64,
    /// The same with arrays of them.
    arrays: f64,
    /// The most memory that the process has had.
    memory: u64,
}

impl Bench<'_> {
    fn ensure_wanted(&self) -> anyhow::Result<()> {
        ensure!(!self.interrupt.is_set(), "interrupted");
        Ok(())
    }

    fn until(&self, mut done: impl FnMut() -> anyhow::Result<bool>, otherwise: &str) -> anyhow::Result<()> {
        let done = || {
            self.ensure_wanted()?;
            done()
        };
        until(done, otherwise)
    }

    /// Accepts the messages, and then has a relay publish them.
    fn publish(&mut self) -> anyhow::Result<()> {
        const CHUNK: u32 = 10_000;
        /// Ninety-seven bytes, to which accepting adds ` #0` or more.
        const TEXT: &str =
            "A message as long as most of them are: what happened, to whom, and when, in about a hundred bytes";
        let messages = self.args.messages;
        for first in (0..messages).step_by(CHUNK as usize) {
            self.ensure_wanted()?;
            let count = Some(CHUNK.min(messages - first).into());
            let new = New { text: TEXT, key: None, partition: None, count };
            self.stage.database.transaction(|conn| message_outbox::append(conn, &new, None))?;
        }
        let mut conn = self.stage.connection()?;
        baseline::settle(&mut conn)?;
        let start = Instant::now();
        let relay = self.stage.fleet.start(RELAY, &[])?;
        let all_published = || Ok(baseline::messages_published(&mut conn)? >= messages.into());
        self.until(all_published, "messages aren't published")?;
        let elapsed = start.elapsed().as_secs_f64();
        self.stage.fleet.stop(&relay, STOPPED)?;
        baseline::settle(&mut conn)?;
        self.figures.push(Figure {
            what: format!("{messages} messages of 100 bytes in the outbox: published by one relay"),
            value: f64::from(messages) / elapsed,
            unit: "messages/s",
            asked: None,
            reached: None,
            detail: format!("{elapsed:.1} s from its start"),
        });
        Ok(())
    }

    fn replays(&mut self) -> anyhow::Result<()> {
        let runs: Vec<_> = (0..self.args.runs).map(|run| self.replay(run)).collect::<anyhow::Result<_>>()?;
        let of = |figure: fn(&Replay) -> f64| runs.iter().map(figure).collect::<Vec<_>>();
        let partitions = partitions::count(&mut *self.stage.connection()?)?;
        let rates = of(|run| run.rate);
        let rate = median(&rates);
        self.figures.push(Figure {
            what: format!(
                "{} messages of 100 bytes in {partitions} partitions, replayed from the first by one recorder",
                self.args.messages
            ),
            value: rate,
            unit: "messages/s",
            asked: Some("≥ 40000"),
            reached: Some(rate >= 40_000.0),
            detail: format!(
                "{} from the start of the process, {} from the first one recorded; {} runs",
                spread(&rates),
                spread(&of(|run| run.running)),
                self.args.runs
            ),
        });
        let mut compare = |how, plain: fn(&Replay) -> f64, asked: Option<&'static str>| {
            let ratios: Vec<_> = runs.iter().map(|run| run.rate / plain(run)).collect();
            let plain = of(plain);
            let ratio = median(&ratios);
            self.figures.push(Figure {
                what: format!("that ÷ plain INSERTs of the same rows, {} in a transaction, {how}", self.batch),
                value: ratio,
                unit: "",
                asked,
                reached: asked.map(|_| ratio >= 0.5),
                detail: format!("plain {} rows/s; ratios {}", spread(&plain), spread(&ratios)),
            });
        };
        compare("as a batch insert of diesel's: VALUES (…), (…), …", |run| run.rows, Some("≥ 0.5"));
        compare("by the recorder's own statement: SELECT FROM unnest(…)", |run| run.arrays, None);
        let memory = runs.iter().map(|run| run.memory).max().unwrap_or(0);
        self.figures.push(Figure {
            what: "its resident memory, at most".into(),
            value: memory as f64 / 1e6,
            unit: "MB",
            asked: Some("≤ 60 MB"),
            reached: Some(memory <= 60_000_000),
            detail: String::new(),
        });
        Ok(())
    }

    fn replay(&mut self, run: u32) -> anyhow::Result<Replay> {
        let group = Group::parse(&format!("replay-{run}"))?;
        let mut conn = self.stage.connection()?;
        baseline::checkpoint(&mut conn)?;
        let began = baseline::now(&mut conn)?;
        let recorder = self.start(&group, "first")?;
        let mut memory = 0;
        self.until(
            || {
                let done = is_read_up(&mut conn, &group)?;
                memory = self.stage.fleet.peak_resident_bytes(&recorder)?;
                Ok(done)
            },
            "messages aren't recorded",
        )?;
        self.stage.fleet.stop(&recorder, STOPPED)?;
        self.ensure_exactly_once(&group, self.args.messages)?;
        let recorded = message_audit::recorded(&mut conn, &group, "")?;
        let rows = self.plain(&group, Plain::Rows)?;
        let arrays = self.plain(&group, Plain::Arrays)?;
        baseline::forget_messages(&mut conn)?;
        let messages = f64::from(self.args.messages);
        Ok(Replay {
            rate: messages / seconds(Some(began), recorded.last_recorded_at)?,
            running: messages / seconds(recorded.first_recorded_at, recorded.last_recorded_at)?,
            rows,
            arrays,
            memory,
        })
    }

    /// Writes what the group has recorded by plain statements, the rows in hand; answers how many a second.
    fn plain(&self, group: &Group, plain: Plain) -> anyhow::Result<f64> {
        const PAGE: i64 = 100_000;
        let mut conn = self.stage.connection()?;
        baseline::create_plain_message(&mut conn)?;
        baseline::checkpoint(&mut conn)?;
        let (mut elapsed, mut rows) = (Duration::ZERO, 0);
        for partition in 0..partitions::count(&mut conn)? {
            let mut after = None;
            loop {
                self.ensure_wanted()?;
                let page = messages::page(&mut conn, group, Pick::Partition(partition, after), PAGE, i64::MAX)?;
                let Some(last) = page.last() else { break };
                after = Some(last.offset);
                let page: Vec<_> = page.iter().map(|message| as_new(group, message)).collect();
                let start = Instant::now();
                for batch in page.chunks(self.batch) {
                    baseline::plain_messages(&mut conn, plain, batch)?;
                    rows += batch.len();
                }
                elapsed += start.elapsed();
            }
        }
        baseline::drop_plain_message(&mut conn)?;
        ensure!(rows == self.args.messages as usize, "{rows} rows written plainly");
        Ok(rows as f64 / elapsed.as_secs_f64())
    }

    fn latencies(&mut self) -> anyhow::Result<()> {
        const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("the longest", 1.0)];
        let count = self.args.seconds * RATE;
        let (mut latencies, mut rates) = (SHARES.map(|_| Vec::new()), Vec::new());
        for run in 0..self.args.runs {
            let group = Group::parse(&format!("latency-{run}"))?;
            let mut conn = self.stage.connection()?;
            self.start(&group, "next")?;
            self.shared_by(&group, 1)?;
            baseline::checkpoint(&mut conn)?;
            finish(self.load(count, RATE)?, "the load")?;
            self.read_up(&group, count)?;
            let recorded = message_audit::recorded(&mut conn, &group, "")?;
            rates.push(f64::from(count) / seconds(recorded.first_accepted_at, recorded.last_accepted_at)?);
            for (latencies, (_, share)) in latencies.iter_mut().zip(SHARES) {
                let latency = baseline::message_latency_ms(&mut conn, &group, share)?;
                latencies.push(latency.context("no message was recorded")?);
            }
        }
        // Fewer were easier.
        let is_fast = median(&rates) >= f64::from(RATE) * 0.95;
        let slow = if is_fast { "" } else { ": what posts them, one a request, is too slow" };
        for (latencies, (name, _)) in latencies.iter().zip(SHARES) {
            let (value, asked) = (median(latencies), name == "p99");
            self.figures.push(Figure {
                what: format!(
                    "{RATE} messages/s by way of the gateway for {} s: accepted to recorded, {name}",
                    self.args.seconds
                ),
                value,
                unit: "ms",
                asked: asked.then_some("≤ 250 ms"),
                reached: asked.then_some(value <= 250.0 && is_fast),
                detail: format!(
                    "{}; {} messages/s accepted{slow}; {} runs",
                    spread(latencies),
                    spread(&rates),
                    self.args.runs
                ),
            });
        }
        Ok(())
    }

    /// How long a member's partitions aren't read after it was killed, under a steady load.
    fn takeovers(&mut self) -> anyhow::Result<()> {
        let times: Vec<f64> = (0..self.args.runs).map(|run| self.takeover(run)).collect::<anyhow::Result<_>>()?;
        let value = median(&times);
        self.figures.push(Figure {
            what: format!(
                "one of two members killed while {TAKEOVER_RATE} messages/s come in: until each of its partitions is read again"
            ),
            value: value / 1000.0,
            unit: "s",
            asked: Some("≤ 3 s"),
            reached: Some(value <= 3000.0),
            detail: format!("{} ms; {} runs", spread(&times), self.args.runs),
        });
        Ok(())
    }

    fn takeover(&mut self, run: u32) -> anyhow::Result<f64> {
        let group = Group::parse(&format!("takeover-{run}"))?;
        let mut conn = self.stage.connection()?;
        let member = self.start(&group, "next")?;
        // Alone at first: so it's known which holder it is.
        let holder = self.shared_by(&group, 1)?.into_values().next().context("the partitions have no holder")?;
        self.start(&group, "next")?;
        let held = self.shared_by(&group, 2)?;
        let partitions: Vec<i32> = held.iter().filter(|(_, by)| **by == holder).map(|(number, _)| *number).collect();
        baseline::checkpoint(&mut conn)?;
        let loading = self.load(TAKEOVER_MESSAGES, TAKEOVER_RATE)?;
        let is_steady = || Ok(message_audit::recorded(&mut conn, &group, "")?.messages >= STEADY);
        self.until(is_steady, "messages aren't recorded")?;

        let killed_at = baseline::now(&mut conn)?;
        self.stage.fleet.signal(&member, Signal::KILL)?;
        self.stage.fleet.wait_end(&member, STOPPED)?;
        let mut read_again = None;
        let taken_over = || {
            read_again = baseline::read_again_ms(&mut conn, &group, &partitions, &holder, killed_at)?;
            Ok(read_again.is_some())
        };
        self.until(taken_over, "a killed member's partitions aren't read")?;
        finish(loading, "the load")?;
        self.read_up(&group, TAKEOVER_MESSAGES)?;
        read_again.context("a killed member's partitions aren't read")
    }

    /// Starts a member of a group, which is to begin there if it's new.
    fn start(&mut self, group: &Group, from: &str) -> anyhow::Result<Name> {
        self.stage.fleet.start(RECORDER, &[(GROUP, group.as_str()), (FROM, from)])
    }

    /// Waits until so many members share the group's partitions, and read; answers who has which.
    fn shared_by(&mut self, group: &Group, members: usize) -> anyhow::Result<BTreeMap<i32, String>> {
        let mut conn = self.stage.connection()?;
        let resources: BTreeMap<_, _> =
            (0..partitions::count(&mut conn)?).map(|number| (group.resource(number), number)).collect();
        let names: Vec<&str> = resources.keys().map(String::as_str).collect();
        let mut held = BTreeMap::new();
        let shared = || {
            let leases = leases::list(&mut conn, &names)?.into_iter().filter(|lease| !lease.expired);
            held = leases.filter_map(|lease| Some((*resources.get(&lease.resource)?, lease.holder?))).collect();
            Ok(held.len() == resources.len() && held.values().collect::<BTreeSet<_>>().len() == members)
        };
        self.until(shared, "the members don't share the partitions")?;
        self.stage.fleet.wait_ready(Duration::from_secs(60))?;
        Ok(held)
    }

    /// `fleetctl load messages`, each of them in a request of its own.
    fn load(&self, count: u32, rate: u32) -> anyhow::Result<Child> {
        let (count, rate) = (count.to_string(), rate.to_string());
        let pace = ["--count", &count, "--rate", &rate];
        self.stage.fleetctl(["load", "messages", "--batch", "1", "--connections", "8"].into_iter().chain(pace))
    }

    /// Waits until a group that began with the first of so many messages has recorded them, stops its members, and checks what
    /// they did.
    fn read_up(&mut self, group: &Group, messages: u32) -> anyhow::Result<()> {
        let mut conn = self.stage.connection()?;
        self.until(|| is_read_up(&mut conn, group), "messages aren't recorded")?;
        self.stage.fleet.stop_service(RECORDER)?;
        self.ensure_exactly_once(group, messages)
    }

    /// Checks that a group has recorded so many messages, each once and in order.
    fn ensure_exactly_once(&self, group: &Group, messages: u32) -> anyhow::Result<()> {
        let (totals, findings) = self.stage.database.transaction(|conn| log_audit::run(conn, group))?;
        for finding in &findings {
            ensure!(finding.count == 0, "group {group}: {}: {}", finding.check, finding.count);
        }
        let recorded: i64 = totals.iter().map(|totals| totals.recorded).sum();
        ensure!(recorded == i64::from(messages), "group {group} has recorded {recorded} of {messages} messages");
        Ok(())
    }
}

/// Whether the group has recorded all that was accepted.
fn is_read_up(conn: &mut PgConnection, group: &Group) -> anyhow::Result<bool> {
    let progress = log_audit::progress(conn, group)?;
    Ok(progress.iter().all(|partition| partition.waiting == 0 && partition.recorded == Some(partition.given)))
}

fn seconds(from: Option<DateTime<Utc>>, to: Option<DateTime<Utc>>) -> anyhow::Result<f64> {
    let (from, to) = from.zip(to).context("nothing was recorded")?;
    Ok((to - from).to_std().context("the database's clock was set back")?.as_secs_f64())
}

/// The row that a recorder wrote, to be written once more.
fn as_new<'a>(group: &'a Group, message: &'a Message) -> NewMessage<'a> {
    NewMessage {
        group: group.as_str(),
        partition: message.partition,
        offset: message.offset,
        seq: message.message_id.as_deref().and_then(MessageId::parse).map(|id| id.seq),
        message_id: message.message_id.as_deref(),
        key: message.key.as_deref(),
        text: &message.text,
        accepted_at: message.accepted_at,
        recorded_by: &message.recorded_by,
    }
}
