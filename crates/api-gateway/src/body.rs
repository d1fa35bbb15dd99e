//! Request bodies, taken apart into fields.

use crate::{
    error::Error,
    fields::{Fields, Value},
    gateway::Gateway,
};
use actix_multipart::Multipart;
use actix_web::{
    FromRequest, HttpRequest,
    body::{BodyStream, to_bytes_limited},
    dev::Payload,
    http::header::{CONTENT_LENGTH, CONTENT_TYPE},
    rt::time::timeout,
    web::{Bytes, BytesMut},
};
use futures_util::{TryStreamExt as _, future::LocalBoxFuture};

/// The fields of a JSON body.
pub(crate) struct Json(pub(crate) Fields);

/// The fields of a body that is JSON or a form.
pub(crate) struct Form(pub(crate) Fields);

impl FromRequest for Json {
    type Error = Error;
    type Future = LocalBoxFuture<'static, Result<Self, Error>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (req, payload) = (req.clone(), payload.take());
        Box::pin(async move {
            let limit = Gateway::of(&req).http.body_limit_bytes;
            read(&req, payload, Kinds::Json, limit).await.map(Self)
        })
    }
}

impl FromRequest for Form {
    type Error = Error;
    type Future = LocalBoxFuture<'static, Result<Self, Error>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (req, payload) = (req.clone(), payload.take());
        Box::pin(async move {
            let limit = Gateway::of(&req).http.body_limit_bytes;
            read(&req, payload, Kinds::JsonAndForms, limit).await.map(Self)
        })
    }
}

/// Which kinds of bodies a path takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kinds {
    /// JSON objects.
    Json,
    /// JSON objects and both kinds of forms.
    JsonAndForms,
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read(req: &HttpRequest, payload: Payload, kinds: Kinds, limit: usize) -> Result<Fields, Error> {
    let form = kinds == Kinds::JsonAndForms;
    let receive = async {
        match essence(req).as_str() {
            essence if is_json(essence) => json(&bytes(payload, limit).await?),
            "application/x-www-form-urlencoded" if form => Ok(urlencoded(&bytes(payload, limit).await?)),
            "multipart/form-data" if form => multipart(Multipart::new(req.headers(), payload), limit).await,
            _ if form => Err(Error::UnsupportedMediaType(
                "application/json, application/x-www-form-urlencoded or multipart/form-data",
            )),
            _ => Err(Error::UnsupportedMediaType("application/json")),
        }
    };
    within_limits(req, limit, receive).await
}

/// Reads a JSON body of at most `limit` bytes, for its reader to take apart.
pub(crate) async fn read_json(req: &HttpRequest, payload: Payload, limit: usize) -> Result<Bytes, Error> {
    let receive = async {
        match is_json(&essence(req)) {
            true => bytes(payload, limit).await,
            false => Err(Error::UnsupportedMediaType("application/json")),
        }
    };
    within_limits(req, limit, receive).await
}

async fn within_limits<T>(
    req: &HttpRequest,
    limit: usize,
    receive: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let declared = req.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(too_large(limit));
    }
    timeout(Gateway::of(req).http.request_timeout(), receive).await.unwrap_or(Err(Error::SlowBody))
}

/// The content type, without its parameters.
fn essence(req: &HttpRequest) -> String {
    let content_type = req.headers().get(CONTENT_TYPE).map_or(Ok(""), |value| value.to_str()).unwrap_or("unreadable");
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn is_json(essence: &str) -> bool {
    // Clients that don't say what they send send JSON.
    matches!(essence, "" | "application/json") || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn too_large(limit: usize) -> Error {
    Error::TooLarge { what: "the body".into(), limit }
}

async fn bytes(payload: Payload, limit: usize) -> Result<Bytes, Error> {
    match to_bytes_limited(BodyStream::new(payload), limit).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => Err(Error::MalformedBody("the body arrived incomplete".into())),
        Err(_) => Err(too_large(limit)),
    }
}

/// The parser's own message may quote the body; where it gave up is enough.
pub(crate) fn not_json(error: &serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    Error::MalformedBody(format!("the body isn't JSON, as of line {line} column {column}").into())
}

pub(crate) fn not_an_object() -> Error {
    Error::MalformedBody("the body must be a JSON object".into())
}

fn json(body: &[u8]) -> Result<Fields, Error> {
    let serde_json::Value::Object(object) = serde_json::from_slice(body).map_err(|error| not_json(&error))? else {
        return Err(not_an_object());
    };
    let mut fields = Fields::default();
    for (name, value) in object {
        fields.add(name, Value::Json(value));
    }
    Ok(fields)
}

/// Browsers send inputs that were left blank: in a form, these count as absent.
fn add_text(fields: &mut Fields, name: String, text: String) {
    if !text.trim().is_empty() {
        fields.add(name, Value::Text(text));
    }
}

fn urlencoded(body: &[u8]) -> Fields {
    let mut fields = Fields::default();
    for (name, value) in url::form_urlencoded::parse(body) {
        add_text(&mut fields, name.into_owned(), value.into_owned());
    }
    fields
}

async fn multipart(mut form: Multipart, limit: usize) -> Result<Fields, Error> {
    const PARTS_MAX: usize = 64;
    let malformed = |_| Error::MalformedBody("the body isn't multipart/form-data, or arrived incomplete".into());
    let (mut fields, mut left) = (Fields::default(), limit);
    let mut parts = 0;
    while let Some(mut part) = form.try_next().await.map_err(malformed)? {
        parts += 1;
        if parts > PARTS_MAX {
            return Err(Error::MalformedBody(format!("the form may have at most {PARTS_MAX} fields").into()));
        }
        let mut content = BytesMut::new();
        while let Some(chunk) = part.try_next().await.map_err(malformed)? {
            left = left.checked_sub(chunk.len()).ok_or_else(|| too_large(limit))?;
            content.extend_from_slice(&chunk);
        }
        let name = part.name().unwrap_or_default().to_owned();
        let is_file = part.content_disposition().is_some_and(|disposition| disposition.get_filename().is_some());
        match String::from_utf8(content.into()) {
            Ok(text) if !is_file => add_text(&mut fields, name, text),
            Ok(text) => fields.add(name, Value::File(text.into())),
            Err(bytes) => fields.add(name, Value::File(bytes.into_bytes().into())),
        }
    }
    Ok(fields)
}
