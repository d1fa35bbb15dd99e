//! What every request gets: a correlation id, a line in the log, and the headers that every answer has.

use crate::error::{Error, chain};
use actix_web::{
    FromRequest, HttpMessage as _, HttpRequest,
    body::MessageBody,
    dev::{Payload, ServiceRequest, ServiceResponse},
    http::header::{CACHE_CONTROL, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    middleware::Next,
};
use std::{
    future::{Ready, ready},
    sync::Arc,
    time::Instant,
};
use telemetry::RequestServed;
use uuid::Uuid;

const HEADER: HeaderName = HeaderName::from_static("x-correlation-id");

/// Ties together everything that follows from one request: the client's `X-Correlation-Id` where it's well-formed, else
/// a fresh one.
#[derive(Clone)]
pub(crate) struct CorrelationId(Arc<str>);

impl CorrelationId {
    fn of(req: &ServiceRequest) -> Self {
        const LENGTH_MAX: usize = 64;
        let well_formed = |id: &&str| {
            (1..=LENGTH_MAX).contains(&id.len())
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        let given = req.headers().get(HEADER).and_then(|id| id.to_str().ok()).filter(well_formed);
        Self(given.map_or_else(|| Uuid::new_v4().to_string().into(), Arc::from))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromRequest for CorrelationId {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(req: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Ok(req.extensions().get::<Self>().cloned().expect("`observe` wraps every handler")))
    }
}

/// The pattern of the path that a request matched. Kept by each resource: asking the router costs another search.
#[derive(Clone, Copy)]
pub(crate) struct Route(pub(crate) &'static str);

pub(crate) async fn observe(
    req: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, actix_web::Error> {
    let start = Instant::now();
    let id = CorrelationId::of(&req);
    req.extensions_mut().insert(id.clone());
    let mut res = next.call(req).await?;

    if let Some(Error::Internal(error)) = res.response().error().and_then(|error| error.as_error::<Error>()) {
        log::error!(correlation_id = id.as_str(), error:% = chain(error.as_ref()); "a request failed");
    }
    let headers = res.headers_mut();
    headers.insert(HEADER, HeaderValue::from_str(id.as_str()).expect("letters, digits, dots, dashes"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    telemetry::emit(RequestServed {
        method: res.request().method().as_str(),
        route: res.request().app_data::<Route>().map_or("unknown", |route| route.0),
        status: res.status().as_u16(),
        duration: start.elapsed(),
        correlation_id: id.as_str(),
    });
    Ok(res)
}
