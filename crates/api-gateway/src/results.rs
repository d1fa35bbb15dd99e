//! The page that shows what becomes of account events, and the JSON that it asks for.

use crate::{
    error::Error,
    events::Event,
    fields::{self, Fields, text},
    gateway::{Gateway, before},
};
use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{CONTENT_SECURITY_POLICY, REFERRER_POLICY},
    web,
};
use chrono::{DateTime, Utc};
use domain::{stream::AccountId, values::Invalid};
use futures_util::lock::Mutex as AsyncMutex;
use serde::Serialize;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use storage::results::{self, Disordered, Only, Order, Part, Totals};

/// Nothing but the page's own style, script and questions.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

fn asset(content_type: &str, content: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(content_type)
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((REFERRER_POLICY, "no-referrer"))
        .body(content)
}

pub(crate) async fn page() -> HttpResponse {
    asset("text/html; charset=utf-8", include_str!("../assets/results.html"))
}

pub(crate) async fn style() -> HttpResponse {
    asset("text/css; charset=utf-8", include_str!("../assets/results.css"))
}

pub(crate) async fn script() -> HttpResponse {
    asset("text/javascript; charset=utf-8", include_str!("../assets/results.js"))
}

/// Totals by prefix, so that many who look cost one query: computed by one request at a time, and of one prefix not
/// sooner than after ten times as long as that took.
#[derive(Default)]
pub(crate) struct Cache {
    kept: Mutex<HashMap<String, Kept>>,
    computing: Arc<AsyncMutex<()>>,
}

struct Kept {
    /// `None` where computing them took too long.
    totals: Option<Arc<Totals>>,
    /// When they are to be computed again.
    due: Instant,
}

impl Cache {
    /// The prefix's totals and whether these will do for now.
    fn get(&self, prefix: &str) -> (Option<Arc<Totals>>, bool) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(prefix).map_or((None, false), |kept| (kept.totals.clone(), Instant::now() < kept.due))
    }

    fn keep(&self, prefix: &str, totals: Option<Arc<Totals>>, took: Duration) {
        const PREFIXES_MAX: usize = 64;
        const PATIENCE: u32 = 10;
        const PATIENCE_MIN: Duration = Duration::from_millis(500);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let totals = totals.or_else(|| kept.remove(prefix)?.totals);
        if kept.len() >= PREFIXES_MAX {
            let oldest = kept.iter().min_by_key(|(_, kept)| kept.due).map(|(prefix, _)| prefix.clone());
            kept.remove(&oldest.unwrap_or_default());
        }
        let due = Instant::now() + (took * PATIENCE).max(PATIENCE_MIN);
        kept.insert(prefix.into(), Kept { totals, due });
    }
}

/// What the cache has, or else the answer of the database.
async fn totals(gateway: &Gateway, cache: web::Data<Cache>, prefix: &str) -> Result<Arc<Totals>, Error> {
    let permit = match (cache.get(prefix), cache.computing.clone().try_lock_owned()) {
        ((Some(totals), fresh), permit) if fresh || permit.is_none() => return Ok(totals),
        ((None, true), _) => return Err(Error::TimedOut),
        (_, Some(permit)) => permit,
        (_, None) => before(gateway.soon(), cache.computing.clone().lock_owned()).await?,
    };
    // Whoever had the lock may have computed just these.
    if let (Some(totals), true) = cache.get(prefix) {
        return Ok(totals);
    }
    let prefix = prefix.to_owned();
    let compute = move |conn: &mut _| {
        // To the end of the query: the request may be given up before that.
        let _permit = &permit;
        let begun = Instant::now();
        let totals = results::totals(conn, &prefix).map(Arc::new);
        if matches!(totals, Ok(_) | Err(storage::Error::TooSlow(_))) {
            cache.keep(&prefix, totals.as_ref().ok().cloned(), begun.elapsed());
        }
        totals
    };
    gateway.write(&[], gateway.soon(), compute).await
}

/// All accounts that were asked for, taken together. Accounts are texts here, also those that look like a number: one of
/// more than 53 bits wouldn't survive a browser.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TotalsJson<'a> {
    computed_at: DateTime<Utc>,
    accounts: i64,
    waiting_accounts: i64,
    parked_accounts: i64,
    disordered_accounts: i64,
    accepted: i64,
    applied: i64,
    skipped: i64,
    waiting: i64,
    /// Of those that wait, the ones behind a parked event or parked themselves.
    parked: i64,
    order_errors: i64,
    first_generated_at: Option<DateTime<Utc>>,
    last_processed_at: Option<DateTime<Utc>>,
    elapsed_ms: Option<f64>,
    longest_account: Option<LongestJson<'a>>,
    elapsed_to_longest: Option<f64>,
    events_per_second: Option<f64>,
    workers: Vec<WorkerJson<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LongestJson<'a> {
    account_id: &'a str,
    events: i64,
    work_ms: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkerJson<'a> {
    worker: &'a str,
    applied: i64,
    first_processed_at: Option<DateTime<Utc>>,
    last_processed_at: Option<DateTime<Utc>>,
}

impl<'a> From<&'a Totals> for TotalsJson<'a> {
    fn from(totals: &'a Totals) -> Self {
        let elapsed = totals.first_generated_at.zip(totals.last_processed_at).map(|(first, last)| last - first);
        let elapsed_ms = elapsed.and_then(|elapsed| elapsed.num_microseconds()).map(|us| us as f64 / 1000.0);
        let ratio = |a: f64, b: f64| (b > 0.0).then(|| a / b);
        let longest = totals.longest.as_ref();
        Self {
            computed_at: totals.at,
            accounts: totals.accounts,
            waiting_accounts: totals.waiting_accounts,
            parked_accounts: totals.parked_accounts,
            disordered_accounts: totals.disordered_accounts,
            accepted: totals.accepted,
            applied: totals.applied,
            skipped: totals.skipped,
            waiting: totals.waiting(),
            parked: totals.parked,
            order_errors: totals.order_errors,
            first_generated_at: totals.first_generated_at,
            last_processed_at: totals.last_processed_at,
            elapsed_ms,
            longest_account: longest.map(|longest| LongestJson {
                account_id: &longest.key,
                events: longest.events,
                work_ms: longest.work_ms,
            }),
            elapsed_to_longest: elapsed_ms
                .zip(longest)
                .and_then(|(elapsed_ms, longest)| ratio(elapsed_ms, longest.work_ms as f64)),
            events_per_second: elapsed_ms.and_then(|elapsed_ms| ratio(totals.applied as f64 * 1000.0, elapsed_ms)),
            workers: totals
                .workers
                .iter()
                .map(|worker| WorkerJson {
                    worker: &worker.name,
                    applied: worker.applied,
                    first_processed_at: worker.first_at,
                    last_processed_at: worker.last_at,
                })
                .collect(),
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AccountJson {
    account_id: String,
    head: i64,
    applied: i64,
    attempts: i32,
    parked_at: Option<DateTime<Utc>>,
    last_error: Option<String>,
    order_errors: i64,
    /// The first few of these.
    disorder: Vec<DisorderJson>,
    /// The latest, in sequence.
    events: Vec<Event>,
}

#[derive(Serialize)]
struct DisorderJson {
    after: i64,
    seq: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResultsJson<'a> {
    prefix: &'a str,
    now: DateTime<Utc>,
    totals: TotalsJson<'a>,
    only: &'static str,
    sort: &'static str,
    /// How many accounts there are to be listed.
    matching: i64,
    accounts: Vec<AccountJson>,
}

/// Which accounts are listed.
#[derive(Clone, Copy)]
enum Kind {
    All,
    Waiting,
    Parked,
    Errors,
}

fn kind(text: &str) -> Result<(Kind, &'static str), Invalid> {
    match text {
        "all" => Ok((Kind::All, "all")),
        "waiting" => Ok((Kind::Waiting, "waiting")),
        "parked" => Ok((Kind::Parked, "parked")),
        "errors" => Ok((Kind::Errors, "errors")),
        _ => Err(Invalid("must be all, waiting, parked or errors".into())),
    }
}

fn order(text: &str) -> Result<(Order, &'static str), Invalid> {
    match text {
        "id" => Ok((Order::Key, "id")),
        "events" => Ok((Order::Events, "events")),
        _ => Err(Invalid("must be id or events".into())),
    }
}

fn prefix(text: &str) -> Result<String, Invalid> {
    match text {
        "" => Ok(String::new()),
        text => AccountId::parse(text).map(|id| id.as_str().to_owned()),
    }
}

pub(crate) async fn get(
    gateway: web::Data<Gateway>,
    cache: web::Data<Cache>,
    req: HttpRequest,
) -> Result<HttpResponse, Error> {
    /// How many events of an account are listed.
    const EVENTS_MAX: i64 = 60;
    let mut fields = Fields::parameters(&req);
    let prefix = fields.optional("prefix", text(prefix)).unwrap_or_default();
    let (kind, only) = fields.optional("only", text(kind)).unwrap_or((Kind::All, "all"));
    let (order, sort) = fields.optional("sort", text(order)).unwrap_or((Order::Events, "events"));
    let (offset, limit) = fields::page(&mut fields);
    fields.finish(())?;

    let totals = totals(&gateway, cache, &prefix).await?;
    let named = || totals.disordered.iter().map(|account| account.key.clone()).collect::<Vec<_>>();
    let (only_these, matching) = match kind {
        Kind::All => (Only::All, totals.accounts),
        Kind::Waiting => (Only::Waiting, totals.waiting_accounts),
        Kind::Parked => (Only::Parked, totals.parked_accounts),
        Kind::Errors => (Only::Keys(named()), totals.disordered_accounts.min(results::DISORDERED_MAX)),
    };
    let part = Part { prefix: prefix.clone(), only: only_these, order, offset, limit, events: EVENTS_MAX };
    let listed = gateway.read(move |conn| results::accounts(conn, &part)).await?;
    let disorder: HashMap<&str, &Disordered> =
        totals.disordered.iter().map(|account| (account.key.as_str(), account)).collect();
    let accounts = listed.accounts.into_iter().map(|(standing, events)| {
        let disorder = disorder.get(standing.key.as_str());
        AccountJson {
            head: standing.head,
            applied: standing.cursor,
            attempts: standing.attempts,
            parked_at: standing.parked_at,
            last_error: standing.last_error,
            order_errors: disorder.map_or(0, |account| account.errors),
            disorder: disorder.map_or_else(Vec::new, |account| {
                account.first.iter().map(|pair| DisorderJson { after: pair.after, seq: pair.seq }).collect()
            }),
            events: events.into_iter().map(Event::from).collect(),
            account_id: standing.key,
        }
    });
    Ok(HttpResponse::Ok().json(ResultsJson {
        prefix: &prefix,
        now: listed.at,
        totals: TotalsJson::from(&*totals),
        only,
        sort,
        matching,
        accounts: accounts.collect(),
    }))
}
