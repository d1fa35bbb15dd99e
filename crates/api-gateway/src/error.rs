//! Why a request failed, and how its client learns of it: `application/problem+json` (RFC 9457).

use crate::clients;
use actix_web::{
    HttpResponse, ResponseError,
    http::{StatusCode, header},
};
use serde::Serialize;
use std::{borrow::Cow, error::Error as StdError, time::Duration};

/// Why a request failed. The text is for the client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Fields that break the rules, as many of them as an answer tells, and whether there are more.
    #[error("{}", summary(.errors, *.more))]
    InvalidFields { errors: Vec<FieldError>, more: bool },
    /// The body can't be taken apart into fields.
    #[error("{0}")]
    MalformedBody(Cow<'static, str>),
    /// More than is taken; says what may have how many bytes.
    #[error("{what} may have at most {limit} bytes")]
    TooLarge { what: Cow<'static, str>, limit: usize },
    /// The body's content type isn't one that this path takes.
    #[error("the body must be {0}")]
    UnsupportedMediaType(&'static str),
    /// The client took too long to send the body.
    #[error("the body took too long to arrive")]
    SlowBody,
    /// The client took too long to send the head.
    #[error("the request took too long to arrive")]
    SlowHead,
    /// The head of the request is longer than is taken.
    #[error("the header fields are too long")]
    HeadTooLarge,
    /// The path and the query are longer than is taken.
    #[error("path and query may have at most {limit} bytes")]
    UriTooLong { limit: usize },
    /// It isn't HTTP/1.1, or not as it should be.
    #[error("this is not a well-formed HTTP/1.1 request")]
    MalformedRequest,
    /// The gateway isn't called that.
    #[error("there is no such host here; its operator can add it to api_gateway.hosts")]
    WrongHost,
    /// A browser sends it for another site's page.
    #[error("a page of another origin may not do this; the operator can add it to api_gateway.origins")]
    CrossSite,
    /// The client has used up what it may ask for; says of which kind, and when there's some again.
    #[error("too many requests of the kind \"{name}\"")]
    TooManyRequests { name: &'static str, wait: Duration },
    /// There are more connections than there may be.
    #[error("too many connections; try again later")]
    TooManyConnections,
    /// More requests are waiting than can be answered in time, or more bytes of bodies are in hand than there's memory for.
    #[error("too much to do; try again later")]
    Overloaded,
    /// There is nothing at this path.
    #[error("no such path")]
    NoSuchPath,
    /// The path takes other methods.
    #[error("this path accepts {allow}")]
    MethodNotAllowed { allow: String },
    /// There is no such thing; says of what kind.
    #[error("unknown {0}")]
    NotFound(&'static str),
    /// The field's value is somebody else's already.
    #[error("the {0} is taken")]
    Taken(&'static str),
    /// What the request is about isn't in the state that this needs.
    #[error("{0}")]
    Conflict(&'static str),
    /// The database is away, or too busy.
    #[error("the database is not available; try again later")]
    Unavailable(#[source] storage::Error),
    /// Another transaction holds what this needs.
    #[error("another operation holds what this needs; try again later")]
    Busy(#[source] storage::Error),
    /// Requests can't be served yet; says why.
    #[error("{0}")]
    NotReady(&'static str),
    /// It took too long.
    #[error("this took too long; if it was to change something, the change may still have been made")]
    TimedOut,
    /// Anything else. The client learns nothing of it, the log everything.
    #[error("something went wrong; the log has it under this response's X-Correlation-Id")]
    Internal(#[source] Box<dyn StdError + Send + Sync>),
}

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct FieldError {
    /// The field, as the client calls it.
    pub(crate) field: String,
    /// What is wrong with it. Never holds the value.
    pub(crate) detail: String,
}

fn summary(errors: &[FieldError], more: bool) -> String {
    let mut sentences: Vec<_> = errors.iter().map(|error| format!("{} {}", error.field, error.detail)).collect();
    if more {
        sentences.push("and more".into());
    }
    sentences.join("; ")
}

#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'a str,
    status: u16,
    detail: String,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
}

impl Error {
    /// The status, what the problem type ends in, and its title.
    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::InvalidFields { .. } => (StatusCode::BAD_REQUEST, "invalid-fields", "Invalid fields"),
            Self::MalformedBody(_) => (StatusCode::BAD_REQUEST, "malformed-body", "Malformed body"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Too large"),
            Self::UnsupportedMediaType(_) => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "Unsupported media type")
            }
            Self::SlowBody => (StatusCode::REQUEST_TIMEOUT, "slow-body", "Request timeout"),
            Self::SlowHead => (StatusCode::REQUEST_TIMEOUT, "slow-request", "Request timeout"),
            Self::HeadTooLarge => {
                (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "head-too-large", "Header fields too large")
            }
            Self::UriTooLong { .. } => (StatusCode::URI_TOO_LONG, "uri-too-long", "URI too long"),
            Self::MalformedRequest => (StatusCode::BAD_REQUEST, "malformed-request", "Malformed request"),
            Self::WrongHost => (StatusCode::MISDIRECTED_REQUEST, "wrong-host", "Wrong host"),
            Self::CrossSite => (StatusCode::FORBIDDEN, "cross-site", "Cross-site request"),
            Self::TooManyRequests { .. } => (StatusCode::TOO_MANY_REQUESTS, "too-many-requests", "Too many requests"),
            Self::TooManyConnections | Self::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, "overloaded", "Overloaded")
            }
            Self::NoSuchPath => (StatusCode::NOT_FOUND, "no-such-path", "No such path"),
            Self::MethodNotAllowed { .. } => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed")
            }
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Self::Taken(_) => (StatusCode::CONFLICT, "taken", "Taken"),
            Self::Conflict(_) => (StatusCode::CONFLICT, "conflict", "Conflict"),
            Self::Unavailable(_) | Self::NotReady(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Not available")
            }
            Self::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Busy"),
            Self::TimedOut => (StatusCode::SERVICE_UNAVAILABLE, "timed-out", "Timed out"),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
        }
    }
}

impl ResponseError for Error {
    fn status_code(&self) -> StatusCode {
        self.kind().0
    }

    fn error_response(&self) -> HttpResponse {
        const RETRY_AFTER_S: u64 = 2;
        let (status, slug, title) = self.kind();
        let taken;
        let errors = match self {
            Self::InvalidFields { errors, .. } => errors.as_slice(),
            Self::Taken(field) => {
                taken = [FieldError { field: (*field).into(), detail: "is taken".into() }];
                &taken
            }
            _ => &[],
        };
        let problem = Problem {
            kind: format!("urn:murmuration:problem:{slug}"),
            title,
            status: status.as_u16(),
            detail: self.to_string(),
            errors,
        };
        let mut response = HttpResponse::build(status);
        if let Self::MethodNotAllowed { allow } = self {
            response.insert_header((header::ALLOW, allow.as_str()));
        }
        // `json` keeps a content type that is there.
        let mut response = response.content_type("application/problem+json").json(problem);
        let headers = response.headers_mut();
        if let Self::TooManyRequests { name, wait } = self {
            headers.insert(header::RETRY_AFTER, clients::whole_seconds(*wait).into());
            clients::tell_none(headers, name, *wait);
        } else if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
        }
        response
    }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        match error {
            storage::Error::Unavailable(_) | storage::Error::Contention(_) => Self::Unavailable(error),
            storage::Error::Locked(_) => Self::Busy(error),
            storage::Error::NotFound(what) => Self::NotFound(what),
            storage::Error::Taken(field) => Self::Taken(field),
            storage::Error::Conflict(why) => Self::Conflict(why),
            storage::Error::TooSlow(_) => Self::TimedOut,
            storage::Error::Query(_) => Self::Internal(error.into()),
        }
    }
}
