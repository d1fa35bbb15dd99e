//! How much the gateway serves, how soon, and what it bears.

use crate::{
    Gateway,
    attack::{self, Hostile},
    baseline,
    context::Context,
    cpu,
    load::{Load, Outcome, Pace, p99_ms},
    report::{Figure, Machine, Report, median, spread},
    stage::Stage,
};
use anyhow::{Context as _, ensure};
use command_line::progress::Progress;
use domain::UserId;
use harness::Name;
use percent_encoding::percent_decode_str;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use std::{fs, iter, net::SocketAddr, path::PathBuf, process::Command, thread, time::Duration};
use url::Url;

const AUTHOR: UserId = UserId(1);
/// Readers have ids from here on.
const FIRST_READER: i64 = 1000;
const READERS: i64 = 1000;
/// Entries that each of their feeds holds.
const ENTRIES: i64 = 800;
/// Entries of a page.
const PAGE: u32 = 20;
/// Connections of clients that behave.
const CONNECTIONS: usize = 32;
/// The same where more is asked for than can be served.
const OVERLOAD_CONNECTIONS: usize = 2000;
/// How many times the maximum that is.
const OVERLOAD: f64 = 4.0;
/// The longest that a refusal may take to be quick, at the 99th percentile.
const QUICK_MS: f64 = 500.0;
/// From here on it's no refusal but a request that wasn't answered in time.
const TIMED_OUT: Duration = Duration::from_secs(1);

/// By default the limits by address don't hold for clients on this machine. These addresses are nobody's.
const SETTINGS: [(&str, &str); 1] = [("MURMURATION__API_GATEWAY__UNLIMITED_ADDRESSES", "\"192.0.2.0/24\"")];

pub(crate) fn measure(args: &Gateway, context: &Context) -> anyhow::Result<Report> {
    let progress = Progress::waiting("bench gateway");
    let begin = |what: &str| {
        progress.say(what);
        log::info!("{what}");
    };
    allow_connections()?;
    begin("filling the database");
    let mut stage = Stage::new(&args.place, context)?;
    fill(&stage)?;
    let gateway = stage.fleet.start("api-gateway", &SETTINGS)?;
    stage.fleet.start("outbox-relay", &[])?;
    stage.fleet.wait_ready(Duration::from_secs(60))?;

    let stand = Stand::new(args, context, &stage, gateway)?;
    let mut runs = Vec::new();
    // The first one warms caches and plans.
    for number in 0..=args.runs {
        let run = stand.run(|what| begin(&format!("run {number} of {}: {what}", args.runs)))?;
        if number > 0 {
            runs.push(run);
        }
    }
    begin("sign-ups, slow bodies, answers that nobody reads");
    let memory = stand.exhaust()?;
    drop(progress);

    let postgres = baseline::server_version(&mut *stage.connection()?)?;
    let at = chrono::Utc::now().format("%Y-%m-%d %H:%M UTC").to_string();
    let figures = figures(&runs, stand.sessions, memory);
    Ok(Report { benchmark: "gateway", at, machine: Machine::this(postgres), figures })
}

/// Lets this program, and those that it starts, have as many connections as the machine allows: the usual limit is for fewer.
fn allow_connections() -> anyhow::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, ..limit };
    setrlimit(Resource::Nofile, most).context("can't raise the limit of open files")
}

/// Users, and feeds with a past.
fn fill(stage: &Stage) -> anyhow::Result<()> {
    let mut conn = stage.connection()?;
    baseline::seed_users(&mut conn, "author", AUTHOR.0, 1)?;
    baseline::seed_users(&mut conn, "reader", FIRST_READER, READERS)?;
    baseline::seed_followers(&mut conn, AUTHOR, FIRST_READER, READERS)?;
    baseline::seed_feeds(&mut conn, AUTHOR, ENTRIES, FIRST_READER, READERS)?;
    baseline::settle(&mut conn)?;
    Ok(())
}

/// What is measured, and with what.
struct Stand<'a> {
    args: &'a Gateway,
    stage: &'a Stage,
    /// The process.
    gateway: Name,
    address: SocketAddr,
    /// One for each reader's feed.
    requests: Vec<Vec<u8>>,
    /// The gateway's connections to the database.
    sessions: usize,
}

/// What one run has brought.
struct Run {
    /// Feeds/s, and pgbench's queries/s.
    rate: f64,
    pgbench: f64,
    cost: Cost,
    pgbench_cost: PgbenchCost,
    /// 99th percentiles of half the rate, without and with idle and slow clients beside it.
    calm_p99_ms: f64,
    attacked_p99_ms: f64,
    /// How often one of these was cut off.
    cut_off: f64,
    overload: Overload,
}

/// Processor time of a feed over HTTP, in microseconds.
struct Cost {
    gateway: f64,
    /// Where it's on this machine.
    postgres: Option<f64>,
    client: f64,
}

impl Cost {
    fn total(&self) -> Option<f64> {
        Some(self.gateway + self.postgres? + self.client)
    }
}

/// The same of a query of pgbench's.
struct PgbenchCost {
    postgres: Option<f64>,
    pgbench: f64,
}

/// What came of more than can be served.
struct Overload {
    rate: f64,
    /// Requests/s that were sent: as many as the client had free connections for.
    offered: f64,
    /// The share of these that was refused, and how soon.
    refused: f64,
    refused_p99_ms: f64,
    /// How soon the others were answered, from when they were sent.
    served_p99_ms: f64,
    /// Those with another answer than these, or a late one, or none.
    failed: f64,
}

impl<'a> Stand<'a> {
    fn new(args: &'a Gateway, context: &Context, stage: &'a Stage, gateway: Name) -> anyhow::Result<Self> {
        let url = Url::parse(&stage.fleet.gateway_url())?;
        let address = *url.socket_addrs(|| None)?.first().context("the gateway has no address")?;
        let request =
            |reader: i64| format!("GET /api/v2/feed/{reader}?limit={PAGE} HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let requests = (FIRST_READER..FIRST_READER + READERS).map(|reader| request(reader).into_bytes()).collect();
        Ok(Self { args, stage, gateway, address, requests, sessions: context.settings.api_gateway.blocking_threads })
    }

    fn load(&self, connections: usize, pace: Pace) -> anyhow::Result<Outcome> {
        let duration = Duration::from_secs(self.args.seconds.into());
        Load { gateway: self.address, requests: &self.requests, connections, pace, duration }.run()
    }

    fn run(&self, begin: impl Fn(&str)) -> anyhow::Result<Run> {
        begin("feeds over HTTP, and by pgbench");
        let (rate, cost) = self.most()?;
        let (pgbench, pgbench_cost) = self.pgbench()?;
        begin("half of that load, alone and beside idle and slow clients");
        let hostile: Vec<Hostile> = iter::repeat_n(Hostile::idle(), 1000)
            .chain(iter::repeat_n(Hostile::slow_head(), 100))
            .chain(iter::repeat_n(Hostile::slow_body(), 100))
            .collect();
        let half = || self.load(CONNECTIONS, Pace::PerSecond(rate / 2.0))?.all_ok();
        let calm_p99_ms = p99_ms(&half()?.latencies);
        let (attacked, cut_off) = attack::during(self.address, &hostile, half)?;
        begin("four times as much as it can");
        let overload = self.overload(rate)?;
        let attacked_p99_ms = p99_ms(&attacked.latencies);
        Ok(Run { rate, pgbench, cost, pgbench_cost, calm_p99_ms, attacked_p99_ms, cut_off: cut_off as f64, overload })
    }

    /// As many feeds as can be had.
    fn most(&self) -> anyhow::Result<(f64, Cost)> {
        let mut conn = self.stage.connection()?;
        let pid = self.stage.fleet.pid(&self.gateway)?;
        let mut times = || anyhow::Ok((cpu::of(pid)?, cpu::postgres(&mut conn)?, cpu::own()?));
        let (gateway, postgres, client) = times()?;
        let outcome = self.load(CONNECTIONS, Pace::WhenAnswered)?.all_ok()?;
        let (gateway_then, postgres_then, client_then) = times()?;
        let each = |spent: Duration| spent.as_secs_f64() * 1e6 / outcome.ok as f64;
        let cost = Cost {
            gateway: each(gateway_then - gateway),
            postgres: postgres_then.zip(postgres).map(|(then, before)| each(then - before)),
            client: each(client_then - client),
        };
        Ok((outcome.rate(), cost))
    }

    /// As many pages as pgbench reads with as many sessions as the gateway has.
    fn pgbench(&self) -> anyhow::Result<(f64, PgbenchCost)> {
        let mut conn = self.stage.connection()?;
        let mut times = || anyhow::Ok((cpu::postgres(&mut conn)?, cpu::ended_children()?));
        let (postgres, pgbench) = times()?;
        let rate = pgbench_rate(self)?;
        let (postgres_then, pgbench_then) = times()?;
        let each = |spent: Duration| spent.as_secs_f64() * 1e6 / (rate * f64::from(self.args.seconds));
        let cost = PgbenchCost {
            postgres: postgres_then.zip(postgres).map(|(then, before)| each(then - before)),
            pgbench: each(pgbench_then - pgbench),
        };
        Ok((rate, cost))
    }

    /// More than can be served.
    fn overload(&self, most: f64) -> anyhow::Result<Overload> {
        let outcome = self.load(OVERLOAD_CONNECTIONS, Pace::PerSecond(OVERLOAD * most))?;
        let late = outcome.refused_after(TIMED_OUT);
        Ok(Overload {
            rate: outcome.rate(),
            offered: outcome.sent as f64 / outcome.elapsed.as_secs_f64(),
            refused: outcome.refusals.len() as f64 / outcome.sent as f64,
            refused_p99_ms: p99_ms(&outcome.refusals),
            served_p99_ms: p99_ms(&outcome.served),
            failed: (outcome.other + outcome.lost + outcome.unanswered + late) as f64,
        })
    }

    /// What takes memory; returns the most that the gateway has had, in bytes.
    fn exhaust(&self) -> anyhow::Result<u64> {
        const KEEP: Duration = Duration::from_secs(2);
        self.sign_up()?;
        attack::burst(self.address, &vec![Hostile::slow_events(15_000_000); 20], KEEP)?;
        let deaf = Hostile::deaf(&self.requests[0], 2000);
        attack::burst(self.address, &vec![deaf; 200], KEEP)?;
        // It still serves.
        self.load(1, Pace::PerSecond(10.0))?.all_ok()?;
        self.stage.fleet.peak_resident_bytes(&self.gateway)
    }

    /// Thirty users at once, with passwords.
    fn sign_up(&self) -> anyhow::Result<()> {
        let url = format!("http://{}/api/v2/user", self.address);
        thread::scope(|scope| {
            let sign_up = |number: usize| {
                let login = format!("signed_up_{number}");
                let user = json!({"login": login, "email": format!("{login}@example.com"), "password": format!("{login} 7u%Xq")});
                let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
                let url = &url;
                scope.spawn(move || {
                    anyhow::Ok(agent.post(url).send_json(user).context("a user can't sign up")?.status().as_u16())
                })
            };
            let answers: Vec<_> = (0..30).map(sign_up).collect();
            for answer in answers {
                let status = answer.join().map_err(|_| anyhow::anyhow!("a sign-up panicked"))??;
                ensure!([201, 429, 503].contains(&status), "{status} for a sign-up");
            }
            Ok(())
        })
    }
}

/// A figure that something is asked of.
fn asked(what: impl Into<String>, value: f64, unit: &'static str, asked: &'static str, reached: bool) -> Figure {
    Figure { what: what.into(), value, unit, asked: Some(asked), reached: Some(reached), detail: String::new() }
}

fn figures(runs: &[Run], sessions: usize, memory: u64) -> Vec<Figure> {
    let of = |field: &dyn Fn(&Run) -> f64| -> Vec<f64> { runs.iter().map(field).collect() };
    let sum = |field: &dyn Fn(&Run) -> f64| of(field).iter().sum::<f64>();
    let reader = "GET /api/v2/feed, 20 of 800 entries";
    let mut figures = Vec::new();

    let ratios = of(&|run| run.rate / run.pgbench);
    let ratio = median(&ratios);
    figures.push(Figure {
        detail: format!(
            "{} requests/s and {} queries/s of {sessions} sessions; ratios {}; {} runs",
            spread(&of(&|run| run.rate)),
            spread(&of(&|run| run.pgbench)),
            spread(&ratios),
            runs.len()
        ),
        ..asked(
            format!("{reader}, {CONNECTIONS} connections: requests/s ÷ pgbench's"),
            ratio,
            "",
            "≥ 0.75",
            ratio >= 0.75,
        )
    });

    let calm = of(&|run| run.calm_p99_ms);
    let p99 = median(&calm);
    figures.push(Figure {
        detail: format!("{} at {:.0} requests/s", spread(&calm), median(&of(&|run| run.rate)) / 2.0),
        ..asked("the same at half of that load, due at fixed times: p99", p99, "ms", "≤ 10 ms", p99 <= 10.0)
    });

    let shares = of(&|run| run.overload.rate / run.rate);
    let share = median(&shares);
    let failed = sum(&|run| run.overload.failed);
    let quick = median(&of(&|run| run.overload.refused_p99_ms));
    figures.push(Figure {
        detail: format!(
            "{}; offered over {OVERLOAD_CONNECTIONS} connections {} times the most; those served had their answers, from sending, by {} ms (p99)",
            spread(&shares),
            spread(&of(&|run| run.overload.offered / run.rate)),
            spread(&of(&|run| run.overload.served_p99_ms))
        ),
        ..asked("four times the most, due at fixed times: 2xx/s ÷ the most", share, "", "≥ 0.85", share >= 0.85)
    });
    figures.push(Figure {
        detail: format!(
            "{} of all were refused; p99 {}",
            spread(&of(&|run| run.overload.refused)),
            spread(&of(&|run| run.overload.refused_p99_ms))
        ),
        ..asked(
            "the others meanwhile, each a 503 with Retry-After: p99 from sending",
            quick,
            "ms",
            "≤ 500 ms",
            quick <= QUICK_MS,
        )
    });
    figures.push(asked(
        "neither: other answers, none, a lost connection, or a 503 after more than a second",
        failed,
        "",
        "0",
        failed == 0.0,
    ));

    let attacked = of(&|run| run.attacked_p99_ms / run.calm_p99_ms);
    let factor = median(&attacked);
    figures.push(Figure {
        detail: format!(
            "{} and {} ms; ratios {}; cut off {} times",
            spread(&of(&|run| run.attacked_p99_ms)),
            spread(&calm),
            spread(&attacked),
            spread(&of(&|run| run.cut_off))
        ),
        ..asked(
            "half of the load beside 1,000 idle connections, 100 half heads and 100 half bodies: p99 ÷ without them",
            factor,
            "",
            "≤ 2",
            factor <= 2.0,
        )
    });

    let megabytes = memory as f64 / 1e6;
    figures.push(asked(
        "resident memory of the gateway, at most, with 30 sign-ups, 20 slow bodies of 15 MB and 200 who read no answers",
        megabytes,
        "MB",
        "≤ 120 MB",
        megabytes <= 120.0,
    ));

    // As good as the first figure where both use up the processors, and steadier where others do as well.
    let per_query = |run: &Run| Some((run.pgbench_cost.postgres? + run.pgbench_cost.pgbench) / run.cost.total()?);
    let shares: Vec<f64> = runs.iter().filter_map(per_query).collect();
    let costs: [(&str, &'static str, Vec<f64>); 6] = [
        ("processor time of a request: gateway", "µs", of(&|run| run.cost.gateway)),
        ("processor time of a request: PostgreSQL", "µs", runs.iter().filter_map(|run| run.cost.postgres).collect()),
        ("processor time of a request: client", "µs", of(&|run| run.cost.client)),
        (
            "processor time of a query of pgbench's: PostgreSQL",
            "µs",
            runs.iter().filter_map(|run| run.pgbench_cost.postgres).collect(),
        ),
        ("processor time of a query of pgbench's: pgbench", "µs", of(&|run| run.pgbench_cost.pgbench)),
        ("all of a query of pgbench's ÷ all of a request", "", shares),
    ];
    let reported = costs.into_iter().filter(|(.., values)| !values.is_empty()).map(|(what, unit, values)| Figure {
        what: what.into(),
        value: median(&values),
        unit,
        asked: None,
        reached: None,
        detail: spread(&values),
    });
    figures.extend(reported);
    figures
}

/// Queries/s of pgbench.
fn pgbench_rate(stand: &Stand<'_>) -> anyhow::Result<f64> {
    let script = stand.args.place.out.join("feed_page.sql");
    // As parameters, like the gateway's: constants would be planned otherwise. It asks for one more than the page has.
    let query = baseline::feed_page_sql().replace("$1", ":reader").replace("$2", ":before").replace("$3", ":count");
    let last = FIRST_READER + READERS - 1;
    let variables =
        format!("\\set reader random({FIRST_READER}, {last})\n\\set before {}\n\\set count {}\n", i64::MAX, PAGE + 1);
    fs::write(&script, variables + &query + ";\n").with_context(|| format!("can't write {}", script.display()))?;
    let url = Url::parse(stand.stage.url.expose()).context("the database's URL can't be read")?;
    let password = percent_decode_str(url.password().unwrap_or_default()).decode_utf8_lossy();
    let output = Command::new(pgbench_binary())
        .args(["--no-vacuum", "--protocol=prepared", "--jobs=2"])
        .arg(format!("--client={}", stand.sessions))
        .arg(format!("--time={}", stand.args.seconds))
        .arg("--file")
        .arg(&script)
        // Not as an argument: those are everybody's to read.
        .envs([
            ("PGHOST", url.host_str().unwrap_or_default()),
            ("PGUSER", url.username()),
            ("PGPASSWORD", password.as_ref()),
        ])
        .env("PGPORT", url.port().unwrap_or(5432).to_string())
        .env("PGDATABASE", url.path().trim_start_matches('/'))
        .output()
        .context("can't run pgbench, which comes with PostgreSQL")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split_whitespace().next()?.parse().ok());
    rate.with_context(|| format!("pgbench failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Debian keeps it outside the path.
fn pgbench_binary() -> PathBuf {
    let mut found: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin/pgbench")))
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| "pgbench".into())
}
