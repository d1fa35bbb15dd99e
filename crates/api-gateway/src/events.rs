//! Account events: taking them in, in order, and telling what became of one account's.

use crate::{
    access::CorrelationId,
    body,
    error::Error,
    fields::{self, Fields, text},
    gateway::Gateway,
    shares::Subject,
};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use domain::{
    stream::{ACCOUNT_EVENT, AccountId, PAYLOAD_MAX, Payload},
    values::Invalid,
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use std::{collections::HashSet, fmt, marker::PhantomData};
use storage::{results, streams};

/// The most events in one request.
const EVENTS_MAX: usize = 10_000;

/// An object of a request's body, its members as they were written.
#[derive(Default)]
struct Members<'a> {
    account_id: Option<&'a RawValue>,
    payload: Option<&'a RawValue>,
    events: Option<&'a RawValue>,
    /// Members that have no business here, and why; the first few.
    refused: Vec<(String, &'static str)>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<'a>(PhantomData<Members<'a>>);

        impl<'de: 'a, 'a> Visitor<'de> for Object<'a> {
            type Value = Members<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'a>, A::Error> {
                const REFUSED_MAX: usize = 10;
                let mut members = Members::default();
                while let Some(name) = map.next_key::<String>()? {
                    let member = match name.as_str() {
                        "accountId" => &mut members.account_id,
                        "payload" => &mut members.payload,
                        "events" => &mut members.events,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            if members.refused.len() < REFUSED_MAX {
                                members.refused.push((name, "is not a recognised field"));
                            }
                            continue;
                        }
                    };
                    if member.replace(map.next_value()?).is_some() && members.refused.len() < REFUSED_MAX {
                        members.refused.push((name, "is given more than once"));
                    }
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Object(PhantomData))
    }
}

/// A list of a request's body: as many of its elements as are taken, as they were written, and how many there are.
struct Elements<'a> {
    first: Vec<&'a RawValue>,
    count: usize,
}

impl<'de: 'a, 'a> Deserialize<'de> for Elements<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List<'a>(PhantomData<Elements<'a>>);

        impl<'de: 'a, 'a> Visitor<'de> for List<'a> {
            type Value = Elements<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Elements<'a>, A::Error> {
                let mut elements = Elements { first: Vec::new(), count: 0 };
                while elements.first.len() < EVENTS_MAX
                    && let Some(element) = seq.next_element()?
                {
                    elements.first.push(element);
                }
                elements.count = elements.first.len();
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    elements.count += 1;
                }
                Ok(elements)
            }
        }

        deserializer.deserialize_seq(List(PhantomData))
    }
}

/// The events of a body, in their order, and the accounts that it names by a string though they look like numbers.
type Events = (Vec<(AccountId, Payload)>, HashSet<AccountId>);

fn parse(body: &[u8]) -> Result<Events, Error> {
    let mut members: Members<'_> = serde_json::from_slice(body).map_err(|error| match error.is_data() {
        true => body::not_an_object(),
        false => body::not_json(&error),
    })?;
    let mut fields = Fields::default();
    let (mut events, mut strings) = (Vec::new(), HashSet::new());
    match (members.events.take(), members.account_id.or(members.payload)) {
        (None, Some(_)) => events.extend(event(&mut fields, &mut strings, "", members)?),
        (list, single) => {
            refuse(&mut fields, "", &members);
            match list.map(|list| serde_json::from_str(list.get())) {
                Some(_) if single.is_some() => {
                    fields.refuse("events", "must not be given together with accountId or payload");
                }
                None => fields.refuse("events", "is required without accountId and payload"),
                Some(Err(_)) => fields.refuse("events", "must be a list"),
                Some(Ok(Elements { count, .. })) if !(1..=EVENTS_MAX).contains(&count) => {
                    fields.refuse("events", format!("must hold 1 to {EVENTS_MAX} events"));
                }
                Some(Ok(Elements { first, count })) => {
                    events.reserve_exact(count);
                    for (index, element) in first.into_iter().enumerate() {
                        match serde_json::from_str(element.get()) {
                            Ok(members) => {
                                let path = format!("events[{index}].");
                                events.extend(event(&mut fields, &mut strings, &path, members)?);
                            }
                            Err(_) => fields.refuse(&format!("events[{index}]"), "must be a JSON object"),
                        }
                        if fields.has_more_errors() {
                            break;
                        }
                    }
                }
            }
        }
    }
    fields.finish(())?;
    Ok((events, strings))
}

fn refuse(fields: &mut Fields, path: &str, members: &Members<'_>) {
    for (name, why) in &members.refused {
        fields.refuse(&format!("{path}{name}"), *why);
    }
}

/// One event. `None` stands for one that is wrong, which `fields` knows.
fn event(
    fields: &mut Fields,
    strings: &mut HashSet<AccountId>,
    path: &str,
    mut members: Members<'_>,
) -> Result<Option<(AccountId, Payload)>, Error> {
    if members.events.take().is_some() {
        members.refused.push(("events".into(), "is not a recognised field"));
    }
    refuse(fields, path, &members);
    if members.payload.is_some_and(|payload| payload.get().len() > PAYLOAD_MAX) {
        return Err(Error::TooLarge { what: format!("{path}payload").into(), limit: PAYLOAD_MAX });
    }
    let account = read(fields, format_args!("{path}accountId"), members.account_id, account_id);
    if let (Some(account), Some(json)) = (&account, members.account_id)
        && json.get().starts_with('"')
        && account.as_str().starts_with(|c: char| c.is_ascii_digit())
    {
        strings.insert(account.clone());
    }
    let payload = read(fields, format_args!("{path}payload"), members.payload, |json| Payload::parse(json.get()));
    Ok(account.zip(payload))
}

fn read<T>(
    fields: &mut Fields,
    name: fmt::Arguments<'_>,
    member: Option<&RawValue>,
    parse: fn(&RawValue) -> Result<T, Invalid>,
) -> Option<T> {
    let value = member.ok_or_else(|| Invalid("is required".into())).and_then(parse);
    value.map_err(|invalid| fields.refuse(&name.to_string(), invalid.0)).ok()
}

/// The account that a JSON value names: [`AccountId`] has an error of its own that would quote the value.
fn account_id(json: &RawValue) -> Result<AccountId, Invalid> {
    match json.get().starts_with('"') {
        true => AccountId::parse(&fields::string(json)?),
        false => {
            // Not `17.0`: a name is written in one way.
            let number = json.get().parse::<u64>();
            AccountId::parse(
                &number.map_err(|_| Invalid("must be a string, or a whole number from 0".into()))?.to_string(),
            )
        }
    }
}

pub(crate) async fn post(
    gateway: web::Data<Gateway>,
    correlation_id: CorrelationId,
    req: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Error> {
    let body = body::read_json(&req, payload.into_inner()).await?;
    let (events, strings) = gateway.compute(move || parse(&body)).await??;
    let accepted = events.len();
    let first = events.first().map(|(account, _)| account.clone());
    let single = first.filter(|first| events.iter().all(|(account, _)| account == first));
    let subject = single.as_ref().map_or(Subject::Accounts, |account| Subject::Account(account.as_str()));
    let append = move |conn: &mut _| streams::append(conn, ACCOUNT_EVENT, &events, Some(correlation_id.as_str()));
    let heads = gateway.write(&[subject], gateway.soon(), append).await?;
    let id = |key| if strings.contains(key) { Id::String(key.as_str()) } else { Id::Usual(key) };
    let heads: Vec<_> = heads.iter().map(|head| Head { account_id: id(&head.key), seq: head.seq }).collect();
    Ok(HttpResponse::Accepted().json(Accepted { accepted, heads }))
}

#[derive(Serialize)]
struct Accepted<'a> {
    accepted: usize,
    heads: Vec<Head<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Head<'a> {
    account_id: Id<'a>,
    seq: i64,
}

/// An account as it's answered: as a string where it was given as one.
#[derive(Serialize)]
#[serde(untagged)]
enum Id<'a> {
    String(&'a str),
    Usual(&'a AccountId),
}

/// What has become of an event, in an answer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Event {
    seq: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    generated_at: DateTime<Utc>,
    processed_at: Option<DateTime<Utc>>,
    worker: Option<String>,
    outcome: Option<String>,
}

impl From<results::Event> for Event {
    fn from(event: results::Event) -> Self {
        let results::Event { seq, generated_at, processed_at, worker, outcome } = event;
        Self { seq, payload: None, generated_at, processed_at, worker, outcome }
    }
}

pub(crate) async fn get(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    /// Events in one answer.
    const PAGE_MAX: i64 = 500;
    /// Bytes of their payloads: a page of the largest would have 32 MB.
    const PAGE_BYTES_MAX: i64 = 1 << 20;
    let mut fields = Fields::parameters(&req);
    let account = fields.required("accountId", text(AccountId::parse));
    let after = fields.optional("after", fields::between(0..=i64::MAX)).unwrap_or(0);
    let (account,) = fields.finish((account,))?;
    let id = account.clone();
    let page = move |conn: &mut _| results::account(conn, &id, after, PAGE_MAX, PAGE_BYTES_MAX);
    let (standing, events) = gateway.read(page).await?;
    let next = events.last().map(|told| told.event.seq).filter(|last| *last < standing.head);
    let events = events.into_iter().map(|told| {
        let payload = RawValue::from_string(told.payload).map_err(|error| Error::Internal(error.into()))?;
        Ok(Event { payload: Some(payload), ..told.event.into() })
    });
    Ok(HttpResponse::Ok().json(Account {
        account_id: account,
        head: standing.head,
        applied: standing.cursor,
        parked: standing.parked_at.is_some(),
        parked_at: standing.parked_at,
        last_error: standing.last_error,
        events: events.collect::<Result<_, Error>>()?,
        next,
    }))
}

/// One account and some of its events. A payload keeps its text, which a `serde_json::Value` on the way would change.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Account {
    account_id: AccountId,
    head: i64,
    applied: i64,
    parked: bool,
    parked_at: Option<DateTime<Utc>>,
    last_error: Option<String>,
    events: Vec<Event>,
    next: Option<i64>,
}
