//! Request bodies, taken apart into fields.

use crate::{
    connections::State,
    error::Error,
    fields::{self, Fields, TooMany, Value},
    gateway::Gateway,
    settings::HttpSettings,
};
use actix_multipart::Multipart;
use actix_web::{
    FromRequest, HttpMessage as _, HttpRequest,
    dev::Payload,
    http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, TRANSFER_ENCODING},
    rt::time::timeout,
    web::{Bytes, BytesMut},
};
use futures_util::{TryStreamExt as _, future::LocalBoxFuture, stream};
use serde::{
    Deserializer as _,
    de::{Error as _, MapAccess, Visitor},
};
use std::{
    fmt,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::runtime::Handle;

/// The fields of a JSON body.
pub(crate) struct Json(pub(crate) Fields);

/// The fields of a body that is JSON or a form.
pub(crate) struct Form(pub(crate) Fields);

impl FromRequest for Json {
    type Error = Error;
    type Future = LocalBoxFuture<'static, Result<Self, Error>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (req, payload) = (req.clone(), payload.take());
        Box::pin(async move { read(&req, payload, Kinds::Json).await.map(Self) })
    }
}

impl FromRequest for Form {
    type Error = Error;
    type Future = LocalBoxFuture<'static, Result<Self, Error>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let (req, payload) = (req.clone(), payload.take());
        Box::pin(async move { read(&req, payload, Kinds::JsonAndForms).await.map(Self) })
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

/// The longest body that is taken apart on a thread that reads and writes HTTP: that takes tenths of a millisecond.
const INLINE_MAX: usize = 64 << 10;

/// Reads a body.
async fn read(req: &HttpRequest, payload: Payload, kinds: Kinds) -> Result<Fields, Error> {
    read_as(req, payload, kinds, Ok).await
}

/// Reads a body, and what `parse` makes of its fields. A long one is taken apart and parsed off the
/// threads that read and write HTTP.
pub(crate) async fn read_as<T: Send + 'static>(
    req: &HttpRequest,
    payload: Payload,
    kinds: Kinds,
    parse: impl FnOnce(Fields) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let form = kinds == Kinds::JsonAndForms;
    let kind = match essence(req).as_str() {
        essence if is_json(essence, req) => Kind::Json,
        "application/x-www-form-urlencoded" if form => Kind::Urlencoded,
        "multipart/form-data" if form => Kind::Multipart(as_mixed(req)),
        _ if form => {
            return Err(Error::UnsupportedMediaType(
                "application/json, application/x-www-form-urlencoded or multipart/form-data",
            ));
        }
        _ => return Err(Error::UnsupportedMediaType("application/json")),
    };
    let body = receive(req, payload).await?;
    if body.len() <= INLINE_MAX {
        return parse(kind.fields(body).await?);
    }
    // Nothing of a whole body is waited for; it's the parser of forms that wants a runtime.
    let runtime = Handle::current();
    let take_apart = move || parse(runtime.block_on(kind.fields(body))?);
    Gateway::of(req).compute(take_apart).await?
}

/// How a body is written.
enum Kind {
    Json,
    Urlencoded,
    /// With the headers that tell where its parts end.
    Multipart(HeaderMap),
}

impl Kind {
    /// Takes a whole body apart.
    async fn fields(self, body: Bytes) -> Result<Fields, Error> {
        match self {
            Self::Json => json(&body),
            Self::Urlencoded => Ok(urlencoded(&body)),
            Self::Multipart(headers) => multipart(Multipart::new(&headers, stream::iter([Ok(body)]))).await,
        }
    }
}

/// Reads a JSON body, for its reader to take apart.
pub(crate) async fn read_json(req: &HttpRequest, payload: Payload) -> Result<Bytes, Error> {
    match is_json(&essence(req), req) {
        true => receive(req, payload).await,
        false => Err(Error::UnsupportedMediaType("application/json")),
    }
}

/// Reads a whole body, in the time and of the size that there is for it.
async fn receive(req: &HttpRequest, payload: Payload) -> Result<Bytes, Error> {
    let http = &Gateway::of(req).http;
    let limit = allowed(req.path(), req.headers(), http)?;
    let mut room = Room::new(req, limit);
    let body = timeout(http.request_timeout(), room.bytes(payload)).await.unwrap_or(Err(Error::SlowBody))?;
    room.leave_to(req);
    Ok(body)
}

/// Reads a body that nobody wants, if it's short and there soon: then the connection needn't end for it.
pub(crate) async fn skip(mut payload: Payload) -> bool {
    const LENGTH_MAX: usize = 64 << 10;
    const PATIENCE: Duration = Duration::from_millis(100);
    let read = async {
        let mut length = 0;
        while let Ok(Some(chunk)) = payload.try_next().await {
            length += chunk.len();
            if length > LENGTH_MAX {
                return false;
            }
        }
        true
    };
    timeout(PATIENCE, read).await.unwrap_or(false)
}

/// What a request's head says of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    Nothing,
    Bytes(u64),
    Chunks,
}

impl Announced {
    pub(crate) fn by(headers: &HeaderMap) -> Self {
        match declared(headers) {
            _ if headers.contains_key(TRANSFER_ENCODING) => Self::Chunks,
            None | Some(0) => Self::Nothing,
            Some(length) => Self::Bytes(length),
        }
    }
}

fn declared(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Returns how many bytes a body may have, unless it's said to have more.
///
/// # Errors
/// [`Error::TooLarge`].
pub(crate) fn allowed(path: &str, headers: &HeaderMap, http: &HttpSettings) -> Result<usize, Error> {
    let limit = if path.starts_with("/api/v1/update-user-avatar-link/") {
        http.avatar_body_limit_bytes()
    } else if path.starts_with("/api/v1/event") {
        http.event_body_limit_bytes
    } else if path.starts_with("/api/v1/message") {
        http.message_body_limit_bytes
    } else {
        http.body_limit_bytes
    };
    match declared(headers) {
        Some(length) if length > limit as u64 => Err(too_large(limit)),
        _ => Ok(limit),
    }
}

/// How many bytes of request bodies, or of answers, there may be, all together: what many send or read slowly takes memory for
/// long.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    left: Arc<AtomicUsize>,
    /// What large bodies leave to the others.
    reserve: usize,
}

impl Budget {
    pub(crate) fn of(bytes: usize) -> Self {
        Self { left: Arc::new(AtomicUsize::new(bytes)), reserve: bytes / 4 }
    }

    /// Takes so many bytes, if that leaves the reserve.
    fn take(&self, bytes: usize, reserve: usize) -> Result<(), Error> {
        let rest = |left: usize| left.checked_sub(bytes).filter(|rest| *rest >= reserve);
        let taken = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, rest);
        taken.map(|_| ()).map_err(|_| Error::Overloaded)
    }

    /// Takes what an answer has, until it has been written.
    ///
    /// # Errors
    /// [`Error::Overloaded`].
    pub(crate) fn take_answer(&self, bytes: usize) -> Result<Taken, Error> {
        self.take(bytes, 0)?;
        Ok(Taken { budget: self.clone(), bytes })
    }
}

/// Bytes that are taken, until they're given back.
#[derive(Debug)]
pub(crate) struct Taken {
    budget: Budget,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

/// What a request's body may take and has taken, until it's answered.
struct Room {
    limit: usize,
    usual: usize,
    taken: Taken,
    connection: Option<Rc<State>>,
}

impl Room {
    fn new(req: &HttpRequest, limit: usize) -> Self {
        let gateway = Gateway::of(req);
        let connection = req.conn_data::<Rc<State>>().cloned();
        let taken = Taken { budget: gateway.bodies().clone(), bytes: 0 };
        Self { limit, usual: gateway.http.body_limit_bytes, taken, connection }
    }

    fn take(&mut self, bytes: usize) -> Result<(), Error> {
        let used = self.taken.bytes + bytes;
        if used > self.limit {
            return Err(too_large(self.limit));
        }
        let budget = &self.taken.budget;
        budget.take(bytes, if used > self.usual { budget.reserve } else { 0 })?;
        self.taken.bytes = used;
        Ok(())
    }

    /// The whole body.
    async fn bytes(&mut self, payload: Payload) -> Result<Bytes, Error> {
        let mut stream = payload;
        let incomplete = |_| Error::MalformedBody("the body is incomplete".into());
        let mut body = BytesMut::new();
        while let Some(chunk) = stream.try_next().await.map_err(incomplete)? {
            self.take(chunk.len())?;
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// The body is there; what it has taken is kept until the request is answered.
    fn leave_to(self, req: &HttpRequest) {
        if let Some(connection) = &self.connection {
            connection.received();
        }
        req.extensions_mut().insert(self);
    }
}

/// The content type, without its parameters.
fn essence(req: &HttpRequest) -> String {
    let content_type = req.headers().get(CONTENT_TYPE).map_or(Ok(""), |value| value.to_str()).unwrap_or("unreadable");
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// What comes without a content type isn't taken for JSON: any page may have a browser send that, with nobody being asked. Where
/// nothing comes, that's what is wrong.
fn is_json(essence: &str, req: &HttpRequest) -> bool {
    match essence {
        "" => Announced::by(req.headers()) == Announced::Nothing,
        "application/json" => true,
        _ => essence.starts_with("application/") && essence.ends_with("+json"),
    }
}

fn too_large(limit: usize) -> Error {
    Error::TooLarge { what: "the body".into(), limit }
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
    struct Object(Fields);

    impl<'de> Visitor<'de> for &mut Object {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(name) = map.next_key()? {
                let value = Value::Json(map.next_value()?);
                self.0.add(name, value).map_err(|TooMany| A::Error::custom("too many fields"))?;
            }
            Ok(())
        }
    }

    let mut object = Object(Fields::default());
    let mut reader = serde_json::Deserializer::from_slice(body);
    match reader.deserialize_map(&mut object).and_then(|()| reader.end()) {
        Ok(()) => Ok(object.0),
        Err(error) if !error.is_data() => Err(not_json(&error)),
        Err(_) if object.0.is_too_many() => Ok(object.0),
        Err(_) => Err(not_an_object()),
    }
}

/// Browsers send inputs that were left blank: in a form, these count as absent.
fn add_text(fields: &mut Fields, name: String, text: String) -> Result<(), TooMany> {
    match text.trim().is_empty() {
        true => fields.pass(&name),
        false => fields.add(name, Value::Text(text)),
    }
}

fn urlencoded(body: &[u8]) -> Fields {
    let mut fields = Fields::default();
    let _ = fields::pairs(body).try_for_each(|(name, value)| match value {
        Value::Text(text) => add_text(&mut fields, name, text),
        value => fields.add(name, value),
    });
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
            // What ends with a backslash that escapes nothing may be in an encoding that has it within characters (Shift JIS).
            Some(quoted) => {
                unquoted(quoted).or_else(|| quoted.split_once('"').map(|(value, after)| (value.into(), after)))?
            }
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

async fn multipart(mut form: Multipart) -> Result<Fields, Error> {
    let refused = || Error::MalformedBody("the body is not multipart/form-data, or is incomplete".into());
    let malformed = |_| refused();
    let mut fields = Fields::default();
    while let Some(mut part) = form.try_next().await.map_err(malformed)? {
        let header = part.headers().get(CONTENT_DISPOSITION).ok_or_else(refused)?;
        let (name, is_file) = disposition(header.as_bytes()).ok_or_else(refused)?;
        let mut content = BytesMut::new();
        while let Some(chunk) = part.try_next().await.map_err(malformed)? {
            content.extend_from_slice(&chunk);
        }
        let added = match String::from_utf8(content.into()) {
            Ok(text) if !is_file => add_text(&mut fields, name, text),
            Ok(text) => fields.add(name, Value::File(text.into())),
            Err(bytes) => fields.add(name, Value::File(bytes.into_bytes().into())),
        };
        if added.is_err() {
            break;
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
            (b"form-data; name=\"a\"; filename=\"\x83\\\"", Some(("a", true))),
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
