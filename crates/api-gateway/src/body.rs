//! Request bodies, taken apart into fields.

use crate::{
    error::Error,
    fields::{self, Fields, Value},
    gateway::Gateway,
};
use actix_multipart::Multipart;
use actix_web::{
    FromRequest, HttpRequest,
    body::{BodyStream, to_bytes_limited},
    dev::Payload,
    http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue},
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
            "multipart/form-data" if form => multipart(Multipart::new(&as_mixed(req), payload), limit).await,
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
        Ok(Err(_)) => Err(Error::MalformedBody("the body is incomplete".into())),
        Err(_) => Err(too_large(limit)),
    }
}

/// The parser's own message may quote the body; where it gave up is enough.
pub(crate) fn not_json(error: &serde_json::Error) -> Error {
    let (line, column) = (error.line(), error.column());
    Error::MalformedBody(format!("the body is not valid JSON at line {line} column {column}").into())
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
    for (name, value) in fields::pairs(body) {
        match value {
            Value::Text(text) => add_text(&mut fields, name, text),
            value => fields.add(name, value),
        }
    }
    fields
}

/// The content type by which actix takes a form for any parts: of a form's it reads the names by itself, and gives up where a
/// file's is in an encoding that it doesn't know.
fn as_mixed(req: &HttpRequest) -> HeaderMap {
    let given = req.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let parameters = given.split_once(';').map_or("", |(_, parameters)| parameters);
    let mixed = HeaderValue::try_from(format!("multipart/mixed;{parameters}")).ok();
    mixed.into_iter().map(|mixed| (CONTENT_TYPE, mixed)).collect()
}

/// What a part's `Content-Disposition` says: the field's name, and whether it's a file. Old programs write names in Latin-1.
fn disposition(header: &[u8]) -> Option<(String, bool)> {
    let text = str::from_utf8(header).map_or_else(|_| header.iter().copied().map(char::from).collect(), str::to_owned);
    let (kind, mut rest) = text.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return None;
    }
    let (mut name, mut is_file) = (None, false);
    while let Some((key, value)) = rest.split_once('=') {
        let (value, after) = match value.trim_start().strip_prefix('"') {
            Some(quoted) => unquoted(quoted)?,
            None => {
                let (value, after) = value.split_once(';').unwrap_or((value, ""));
                (value.trim().to_owned(), after)
            }
        };
        match key.trim_matches(|c: char| c == ';' || c.is_whitespace()).to_ascii_lowercase().as_str() {
            "name" => name = Some(value),
            "filename" | "filename*" => is_file = true,
            _ => {}
        }
        rest = after;
    }
    Some((name?, is_file))
}

/// What stands up to the closing quotation mark, and what comes after it.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let (mut value, mut chars) = (String::new(), text.chars());
    loop {
        match chars.next()? {
            '"' => return Some((value, chars.as_str())),
            '\\' => value.push(chars.next()?),
            c => value.push(c),
        }
    }
}

async fn multipart(mut form: Multipart, limit: usize) -> Result<Fields, Error> {
    const PARTS_MAX: usize = 64;
    let refused = || Error::MalformedBody("the body is not multipart/form-data, or is incomplete".into());
    let malformed = |_| refused();
    let (mut fields, mut left) = (Fields::default(), limit);
    let mut parts = 0;
    while let Some(mut part) = form.try_next().await.map_err(malformed)? {
        parts += 1;
        if parts > PARTS_MAX {
            return Err(Error::MalformedBody(format!("the form may have at most {PARTS_MAX} fields").into()));
        }
        let header = part.headers().get(CONTENT_DISPOSITION).ok_or_else(refused)?;
        let (name, is_file) = disposition(header.as_bytes()).ok_or_else(refused)?;
        let mut content = BytesMut::new();
        while let Some(chunk) = part.try_next().await.map_err(malformed)? {
            left = left.checked_sub(chunk.len()).ok_or_else(|| too_large(limit))?;
            content.extend_from_slice(&chunk);
        }
        match String::from_utf8(content.into()) {
            Ok(text) if !is_file => add_text(&mut fields, name, text),
            Ok(text) => fields.add(name, Value::File(text.into())),
            Err(bytes) => fields.add(name, Value::File(bytes.into_bytes().into())),
        }
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_says_its_name_and_whether_it_is_a_file() {
        for (header, expected) in [
            (&br#"form-data; name="a""#[..], Some(("a", false))),
            (b"FORM-DATA ;name=a", Some(("a", false))),
            (br#"form-data; name="a; filename=\"x\""; size=1"#, Some((r#"a; filename="x""#, false))),
            (b"form-data; name=\"a\"; filename=\"caf\xe9\"", Some(("a", true))),
            (b"form-data; name=\"\xe9\"", Some(("\u{e9}", false))),
            (b"form-data; name=\"\xc3\xa9\"", Some(("\u{e9}", false))),
            (b"form-data; filename*=shift_jis''%83; name=a", Some(("a", true))),
            (br#"form-data; name="a"#, None),
            (br#"form-data; filename="a""#, None),
            (br#"attachment; name="a""#, None),
            (b"form-data", None),
            (b"", None),
        ] {
            let told = disposition(header);
            assert_eq!(told.as_ref().map(|(name, is_file)| (&**name, *is_file)), expected, "{}", header.escape_ascii());
        }
    }
}
