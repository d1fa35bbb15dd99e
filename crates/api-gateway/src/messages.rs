//! The message log: accepting messages, and telling what a consumer group has recorded of them.

use crate::{
    access::CorrelationId,
    body::{self, Kinds},
    error::{Error, FieldError},
    fields::{self, Fields, Value, text},
    gateway::Gateway,
    shares::Subject,
};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use domain::{
    log::{Group, TEXT_MAX, check_key, check_text},
    values::{Invalid, visible},
};
use serde::Serialize;
use serde_json::json;
use storage::{
    consumer_offsets, message_outbox,
    messages::{self, Message, Pick},
    partitions,
};

/// The most messages in one request.
const COUNT_MAX: i64 = 100_000;
/// The most bytes of their texts, numbers apart.
const BYTES_MAX: usize = 64 << 20;

/// A text that `check` accepts and of which something can be seen, without the blanks around it.
fn trimmed(check: fn(&str) -> Result<(), Invalid>) -> impl FnOnce(Value) -> Result<String, Invalid> {
    text(move |text| {
        let text = visible(text)?;
        check(text).map(|()| text.to_owned())
    })
}

/// An id that the client chooses, as [`Group`] and an account's are: these have letters of their own, a key may have any.
fn key(text: &str) -> Result<(), Invalid> {
    check_key(text)?;
    match text.contains(char::is_control) {
        true => Err(Invalid("must not contain control characters".into())),
        false => Ok(()),
    }
}

/// A partition's number; which ones exist is up to the database.
fn partition(value: Value) -> Result<i32, Invalid> {
    match fields::whole(value)? {
        number @ 0.. => Ok(i32::try_from(number).unwrap_or(i32::MAX)),
        _ => Err(Invalid("must not be negative".into())),
    }
}

/// The partition isn't among these.
fn no_such_partition(partitions: i32) -> Error {
    let detail = format!("must be between 0 and {}", partitions - 1);
    Error::InvalidFields { errors: vec![FieldError { field: "partition".into(), detail }], more: false }
}

/// Whether `count` numbered messages of this text are too large, or too many together.
fn check_size(fields: &mut Fields, text: &str, count: i64) {
    let number = format!(" #{}", count - 1);
    let (room, most) = (TEXT_MAX - number.len(), BYTES_MAX / text.len());
    if text.len() > room {
        fields.refuse("text", format!("must be at most {room} bytes long, to leave room for `{number}`"));
    } else if usize::try_from(count).is_ok_and(|count| count > most) {
        fields.refuse("count", format!("must be at most {most} with a text of this length"));
    }
}

pub(crate) async fn post(
    gateway: web::Data<Gateway>,
    correlation_id: CorrelationId,
    req: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Error> {
    /// More rows than this may take longer than a usual request.
    const MANY: i64 = 1000;
    let parse = |mut fields: Fields| {
        let text = fields.required("text", trimmed(check_text));
        let count = fields.optional("count", fields::between(1..=COUNT_MAX));
        let key = fields.optional("key", trimmed(key));
        let partition = fields.optional("partition", partition);
        if let (Some(text), Some(count)) = (&text, count) {
            check_size(&mut fields, text, count);
        }
        let (text,) = fields.finish((text,))?;
        Ok((text, count, key, partition))
    };
    let (text, count, key, partition) = body::read_as(&req, payload.into_inner(), Kinds::JsonAndForms, parse).await?;
    let deadline = if count.is_some_and(|count| count > MANY) { gateway.later() } else { gateway.soon() };
    let append = move |conn: &mut _| {
        let new = message_outbox::New { text: &text, key: key.as_deref(), partition, count };
        match message_outbox::append(conn, &new, Some(correlation_id.as_str()))? {
            0 => Ok(Err(partitions::count(conn)?)),
            published => Ok(Ok(published)),
        }
    };
    let published = gateway.write(&[Subject::Log], deadline, append).await?.map_err(no_such_partition)?;
    Ok(HttpResponse::Ok().json(json!({"success": true, "published": published})))
}

pub(crate) async fn get(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    /// Messages in one answer.
    const PAGE_MAX: i64 = 1000;
    const PAGE_DEFAULT: i64 = 100;
    /// Bytes of their texts: a page of the longest would have 64 MiB.
    const PAGE_BYTES_MAX: usize = 1 << 20;
    let mut fields = Fields::parameters(&req);
    let group = fields.required("group", text(Group::parse));
    if fields.has("after") && !fields.has("partition") {
        fields.refuse("after", "needs a partition");
    }
    let partition = fields.optional("partition", partition);
    let after = fields.optional("after", fields::between(0..=i64::MAX));
    let limit = fields.optional("limit", fields::between(1..=PAGE_MAX)).unwrap_or(PAGE_DEFAULT);
    let (group,) = fields.finish((group,))?;
    let page = move |conn: &mut _| {
        if !consumer_offsets::exists(conn, &group)? {
            return Err(storage::Error::NotFound("group"));
        }
        let partitions = partitions::count(conn)?;
        if partition.is_some_and(|partition| partition >= partitions) {
            return Ok(Err(partitions));
        }
        let pick = partition.map_or(Pick::All, |partition| Pick::Partition(partition, after));
        messages::page(conn, &group, pick, limit, PAGE_BYTES_MAX as i64).map(Ok)
    };
    let page = gateway.read(page).await?.map_err(no_such_partition)?;
    let bytes: usize = page.iter().map(|message| message.text.len()).sum();
    let is_full = page.len() as i64 == limit || bytes >= PAGE_BYTES_MAX;
    let next_after = page.last().map(|message| message.offset).filter(|_| is_full && partition.is_some());
    Ok(HttpResponse::Ok().json(Page { messages: page.into_iter().map(Recorded::from).collect(), next_after }))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    messages: Vec<Recorded>,
    next_after: Option<i64>,
}

/// A message that a group has recorded.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Recorded {
    partition: i32,
    offset: i64,
    message_id: Option<String>,
    key: Option<String>,
    text: String,
    accepted_at: Option<DateTime<Utc>>,
    recorded_by: String,
    recorded_at: DateTime<Utc>,
}

impl From<Message> for Recorded {
    fn from(message: Message) -> Self {
        let Message { partition, offset, message_id, key, text, accepted_at, recorded_by, recorded_at } = message;
        Self { partition, offset, message_id, key, text, accepted_at, recorded_by, recorded_at }
    }
}
