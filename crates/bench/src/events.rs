//! How fast account events take effect, in order, whatever happens.

use crate::{
    Events, baseline,
    context::Context,
    report::{Figure, Machine, Report, median, spread},
    stage::{Stage, finish, until},
};
use anyhow::{Context as _, ensure};
use command_line::progress::Progress;
use diesel::{RunQueryDsl, dsl::sql, sql_types::BigInt};
use domain::stream::{ACCOUNT_EVENT, shard_resource};
use harness::Name;
use rustix::process::Signal;
use std::{
    collections::BTreeSet,
    process::Child,
    time::{Duration, Instant},
};
use storage::{
    PgConnection, account_effects, leases,
    results::{self, Totals},
    stream_audit, streams,
};

const PROCESSOR: &str = "event-processor";
const WORK_MS: &str = "MURMURATION__EVENT_PROCESSOR__WORK_MS";
const PREFETCH: &str = "MURMURATION__EVENT_PROCESSOR__PREFETCH";

pub(crate) fn measure(args: &Events, context: &Context) -> anyhow::Result<Report> {
    let progress = Progress::waiting("bench events");
    let begin = |what: &str| {
        progress.say(what);
        log::info!("{what}");
    };
    begin("setting up");
    let mut stage = Stage::new(&args.place, context)?;
    for service in ["api-gateway", "outbox-relay"] {
        stage.fleet.start(service, &[])?;
    }
    stage.fleet.wait_ready(Duration::from_secs(60))?;
    let mut figures = Vec::new();
    begin("events that take their time, one process");
    slow(args, &mut stage, &mut figures)?;
    begin("the same with three, one of them killed half-way");
    killed(args, &mut stage, &mut figures)?;
    begin("processes that are killed or stopped");
    takeovers(args, &mut stage, &mut figures)?;
    begin("events that take no time, and plain INSERTs of the same rows, in turn");
    fast(args, &mut stage, &mut figures)?;
    begin("with and without one account that has half of all events");
    hot(args, &mut stage, &mut figures)?;
    begin("resharding under load");
    resharded(&mut stage, &mut figures)?;
    drop(progress);

    let postgres = baseline::server_version(&mut *stage.connection()?)?;
    let at = chrono::Utc::now().format("%Y-%m-%d %H:%M UTC").to_string();
    Ok(Report { benchmark: "events", at, machine: Machine::this(postgres), figures })
}

/// `fleetctl load events`.
fn load(stage: &Stage, prefix: &str, accounts: u32, events: u32, more: &[&str]) -> anyhow::Result<Child> {
    let (accounts, events) = (accounts.to_string(), events.to_string());
    let args = ["load", "events", "--prefix", prefix, "--accounts", &accounts, "--events", &events, "--seed", "7"];
    stage.fleetctl(args.into_iter().chain(more.iter().copied()))
}

/// Starts processes, with none of an earlier run left.
fn start(stage: &mut Stage, processes: u32, settings: &[(&str, &str)]) -> anyhow::Result<Vec<Name>> {
    stage.fleet.stop_service(PROCESSOR)?;
    let names = (0..processes).map(|_| stage.fleet.start(PROCESSOR, settings)).collect::<anyhow::Result<_>>()?;
    stage.fleet.wait_ready(Duration::from_secs(60))?;
    shared_by(stage, processes)?;
    Ok(names)
}

/// Waits until every shard is held by one of so many processes, all of which hold some.
fn shared_by(stage: &Stage, processes: u32) -> anyhow::Result<()> {
    let mut conn = stage.connection()?;
    let shards = streams::layout(&mut conn, ACCOUNT_EVENT)?.shards;
    let resources: Vec<String> = (0..shards).map(|shard| shard_resource(ACCOUNT_EVENT, shard)).collect();
    let resources: Vec<&str> = resources.iter().map(String::as_str).collect();
    let shared = || {
        let held: Vec<_> = leases::list(&mut conn, &resources)?.into_iter().filter(|lease| !lease.expired).collect();
        let holders: BTreeSet<_> = held.iter().filter_map(|lease| lease.holder.as_deref()).collect();
        let all_held = held.iter().filter(|lease| lease.holder.is_some()).count() == resources.len();
        Ok(all_held && holders.len() == processes as usize)
    };
    until(shared, "the processes don't share the shards")
}

/// Waits until nothing waits any more, and checks that all of it took effect once and in order.
fn settled(stage: &Stage, prefix: &str, events: u32) -> anyhow::Result<Totals> {
    let mut conn = stage.connection()?;
    until(|| Ok(stream_audit::backlog(&mut conn, ACCOUNT_EVENT, prefix)?.waiting == 0), "events are waiting")?;
    let run = |conn: &mut _| stream_audit::run(conn, ACCOUNT_EVENT, prefix, account_effects::CHECKS, |_| ());
    let (_, findings) = stage.database.transaction(run)?;
    for finding in &findings {
        ensure!(finding.count == 0, "{}: {}", finding.check, finding.count);
    }
    let totals = stage.database.transaction(|conn| results::totals(conn, prefix))?;
    ensure!(totals.applied == i64::from(events), "{} of {events} events took effect", totals.applied);
    Ok(totals)
}

/// How many events have taken effect so far.
fn applied(conn: &mut PgConnection, prefix: &str) -> anyhow::Result<i64> {
    let count = sql::<BigInt>(&format!("count(*) FROM account_effect WHERE account_id LIKE '{prefix}%'"));
    Ok(diesel::select(count).get_result(conn)?)
}

/// From the first acceptance to the last effect.
fn elapsed(totals: &Totals) -> f64 {
    let span = totals.first_generated_at.zip(totals.last_processed_at).map(|(first, last)| last - first);
    span.and_then(|span| span.to_std().ok()).unwrap_or_default().as_secs_f64()
}

/// Elapsed ÷ what the longest account takes by itself.
fn beside_longest(args: &Events, totals: &Totals) -> (f64, String) {
    let longest = totals.longest.as_ref().map_or(0, |longest| longest.events);
    let alone = longest as f64 * f64::from(args.work_ms) / 1000.0;
    let elapsed = elapsed(totals);
    (elapsed / alone, format!("{elapsed:.2} s; the longest account has {longest} events"))
}

fn slow(args: &Events, stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let names = start(stage, 1, &[(WORK_MS, &args.work_ms.to_string())])?;
    let loading = load(stage, "one-", args.accounts, args.events, &[])?;
    let mut conn = stage.connection()?;
    let (mut memory, mut seen) = (0, 0);
    until(
        || {
            let resident = stage.fleet.resident_bytes()?;
            memory = resident
                .iter()
                .filter(|(name, _)| *name == names[0])
                .map(|(_, bytes)| *bytes)
                .max()
                .max(Some(memory))
                .unwrap_or(0);
            let backlog = stream_audit::backlog(&mut conn, ACCOUNT_EVENT, "one-")?.waiting;
            seen = backlog.max(seen);
            Ok(seen > 0 && backlog == 0)
        },
        "events are waiting",
    )?;
    finish(loading, "the load")?;
    let totals = settled(stage, "one-", args.events)?;
    let (ratio, detail) = beside_longest(args, &totals);
    figures.push(Figure {
        what: format!(
            "{} events of {} accounts, {} ms each, one process: elapsed ÷ the longest account's own time",
            args.events, args.accounts, args.work_ms
        ),
        value: ratio,
        unit: "",
        asked: Some("≤ 1.05"),
        reached: Some(ratio <= 1.05),
        detail,
    });
    figures.push(Figure {
        what: format!("its resident memory with up to {seen} events in flight, at most"),
        value: memory as f64 / 1e6,
        unit: "MB",
        asked: Some("≤ 150 MB"),
        reached: Some(memory <= 150_000_000),
        detail: String::new(),
    });
    Ok(())
}

fn killed(args: &Events, stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    let names = start(stage, 3, &[(WORK_MS, &args.work_ms.to_string())])?;
    let loading = load(stage, "three-", args.accounts, args.events, &[])?;
    let mut conn = stage.connection()?;
    let half = i64::from(args.events) / 2;
    until(|| Ok(applied(&mut conn, "three-")? >= half), "half of the events aren't through")?;
    stage.fleet.signal(&names[1], Signal::KILL)?;
    finish(loading, "the load")?;
    let totals = settled(stage, "three-", args.events)?;
    let (ratio, detail) = beside_longest(args, &totals);
    figures.push(Figure {
        what: "the same with three processes, one killed half-way".into(),
        value: ratio,
        unit: "",
        asked: Some("≤ 1.25"),
        reached: Some(ratio <= 1.25),
        detail: format!("{detail}; order errors: {}", totals.order_errors),
    });
    Ok(())
}

/// How long the shards are without their process after it ends, in either way.
fn takeovers(args: &Events, stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    for (signal, how, asked, limit) in [
        (Signal::KILL, "killed", "≤ 3 s", Duration::from_secs(3)),
        (Signal::TERM, "asked to stop, with nothing in hand", "≤ 1 s", Duration::from_secs(1)),
    ] {
        let mut seconds = Vec::new();
        for _ in 0..args.runs {
            let names = start(stage, 2, &[(WORK_MS, "0")])?;
            let began = Instant::now();
            stage.fleet.signal(&names[0], signal)?;
            shared_by(stage, 1)?;
            seconds.push(began.elapsed().as_secs_f64());
        }
        let value = median(&seconds);
        figures.push(Figure {
            what: format!("a process {how}: until another has all its shards"),
            value,
            unit: "s",
            asked: Some(asked),
            reached: Some(value <= limit.as_secs_f64()),
            detail: format!("{}; {} runs", spread(&seconds), args.runs),
        });
    }
    Ok(())
}

fn fast(args: &Events, stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    const ACCOUNTS: u32 = 10_000;
    const BATCH: i64 = 1000;
    start(stage, 1, &[(WORK_MS, "0")])?;
    let mut conn = stage.connection()?;
    let (mut rates, mut plain, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..args.runs {
        baseline::checkpoint(&mut conn)?;
        let prefix = format!("fast{run}-");
        finish(load(stage, &prefix, ACCOUNTS, args.fast_events, &["--batch", "1000"])?, "the load")?;
        let rate = f64::from(args.fast_events) / elapsed(&settled(stage, &prefix, args.fast_events)?);
        baseline::checkpoint(&mut conn)?;
        let start = Instant::now();
        let prefix = format!("plain{run}-");
        for first in (0..i64::from(args.fast_events)).step_by(1000) {
            let count = BATCH.min(i64::from(args.fast_events) - first);
            stage.database.transaction(|conn| baseline::plain_events(conn, &prefix, ACCOUNTS.into(), first, count))?;
        }
        let statements = f64::from(args.fast_events) / start.elapsed().as_secs_f64();
        rates.push(rate);
        plain.push(statements);
        ratios.push(rate / statements);
    }
    let rate = median(&rates);
    figures.push(Figure {
        what: format!("{} events of {ACCOUNTS} accounts that take no time: accepted to applied", args.fast_events),
        value: rate,
        unit: "events/s",
        asked: Some("≥ 5000"),
        reached: Some(rate >= 5000.0),
        detail: format!("{}; {} runs", spread(&rates), args.runs),
    });
    figures.push(Figure {
        what: format!("that ÷ plain INSERTs of the same rows, {BATCH} in a transaction"),
        value: median(&ratios),
        unit: "",
        asked: None,
        reached: None,
        detail: format!("plain {} events/s; ratios {}", spread(&plain), spread(&ratios)),
    });
    Ok(())
}

fn hot(args: &Events, stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    const OTHERS: u32 = 5000;
    start(stage, 1, &[(WORK_MS, "2"), (PREFETCH, "500")])?;
    let mut conn = stage.connection()?;
    let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..args.runs {
        let mut p99 = Vec::new();
        for hot in [false, true] {
            let prefix = format!("hot{run}{hot}-");
            let account = format!("{prefix}hot0");
            if hot {
                // Ten times the prefetch, and half of all events.
                finish(load(stage, &format!("{prefix}hot"), 1, OTHERS, &["--batch", "5000"])?, "the load")?;
            }
            finish(load(stage, &prefix, 1000, OTHERS, &["--rate", "1000"])?, "the load")?;
            settled(stage, &prefix, if hot { 2 * OTHERS } else { OTHERS })?;
            p99.push(baseline::event_latency_ms(&mut conn, &prefix, &account, 0.99)?.context("no event took effect")?);
        }
        without.push(p99[0]);
        with.push(p99[1]);
        ratios.push(p99[1] / p99[0]);
    }
    let ratio = median(&ratios);
    figures.push(Figure {
        what: "one account with half of all events, its backlog ten times the prefetch: p99 of the others ÷ without it"
            .into(),
        value: ratio,
        unit: "",
        asked: Some("≤ 1.5"),
        reached: Some(ratio <= 1.5),
        detail: format!(
            "{} and {} ms; ratios {}; {} runs",
            spread(&with),
            spread(&without),
            spread(&ratios),
            args.runs
        ),
    });
    Ok(())
}

fn resharded(stage: &mut Stage, figures: &mut Vec<Figure>) -> anyhow::Result<()> {
    const EVENTS: u32 = 20_000;
    start(stage, 2, &[(WORK_MS, "5..20")])?;
    let loading = load(stage, "shards-", 1000, EVENTS, &["--rate", "1000"])?;
    let mut conn = stage.connection()?;
    let mut seconds = Vec::new();
    for (through, shards) in [(EVENTS / 6, "32"), (EVENTS / 2, "8")] {
        until(|| Ok(applied(&mut conn, "shards-")? >= i64::from(through)), "too few events are through")?;
        let began = Instant::now();
        finish(stage.fleetctl(["reshard", "--shards", shards])?, "resharding")?;
        seconds.push(format!("{:.1} s", began.elapsed().as_secs_f64()));
    }
    finish(loading, "the load")?;
    let totals = settled(stage, "shards-", EVENTS)?;
    let pause = baseline::longest_pause_ms(&mut conn, "shards-")?.context("no event took effect")?;
    figures.push(Figure {
        what: "16 → 32 → 8 shards while 1000 events/s come in, two processes: events lost, doubled or out of order"
            .into(),
        value: totals.order_errors as f64,
        unit: "",
        asked: Some("0"),
        reached: Some(totals.order_errors == 0),
        detail: format!("{EVENTS} events; resharding took {}", seconds.join(" and ")),
    });
    figures.push(Figure {
        what: "longest pause in applied events meanwhile".into(),
        value: pause,
        unit: "ms",
        asked: Some("≤ 2000 ms"),
        reached: Some(pause <= 2000.0),
        detail: String::new(),
    });
    Ok(())
}
