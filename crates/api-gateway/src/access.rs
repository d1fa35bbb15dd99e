//! What every request gets: a correlation id, a line in the log, and the headers that every answer has.

use crate::{
    body::{self, Announced, Taken},
    clients::{Allowance, Clients},
    connections::State,
    error::{Error, chain},
    gateway::Gateway,
    origin,
};
use actix_web::{
    FromRequest, HttpMessage as _, HttpRequest, ResponseError as _,
    body::{BodySize, BoxBody, MessageBody as _},
    dev::{Payload, ServiceRequest, ServiceResponse},
    http::{
        ConnectionType, Method,
        header::{CACHE_CONTROL, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
    },
    middleware::Next,
    web,
};
use std::{
    future::{Ready, ready},
    rc::Rc,
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

/// What every request must pass before anything is done for it.
fn admit<'a>(req: &HttpRequest, clients: &'a Clients) -> Result<Option<Allowance<'a>>, Error> {
    let http = &Gateway::of(req).http;
    let limit = http.uri_limit_bytes;
    if req.uri().path_and_query().is_some_and(|uri| uri.as_str().len() > limit) {
        return Err(Error::UriTooLong { limit });
    }
    origin::check(req, http)?;
    match req.peer_addr() {
        Some(peer) => clients.count(req.method(), req.path(), peer.ip(), req.headers()),
        None => Ok(None),
    }
}

/// Counts an answer, unless it's short. One that tells of a change that was made isn't refused.
fn take(res: &ServiceResponse<BoxBody>) -> Result<Option<Taken>, Error> {
    const COUNTED_FROM: u64 = 8 << 10;
    match res.response().body().size() {
        BodySize::Sized(bytes @ COUNTED_FROM..) if matches!(*res.request().method(), Method::GET | Method::HEAD) => {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            Gateway::of(res.request()).answers().take_answer(bytes).map(Some)
        }
        _ => Ok(None),
    }
}

pub(crate) async fn observe(
    mut req: ServiceRequest,
    next: Next<BoxBody>,
) -> Result<ServiceResponse<BoxBody>, actix_web::Error> {
    let start = Instant::now();
    let connection = req.conn_data::<Rc<State>>().cloned();
    let is_last = req.head().connection_type() == ConnectionType::Close;
    let announced = Announced::by(req.headers());
    let is_served = connection.as_ref().is_none_or(|connection| connection.begin(announced, is_last));
    let id = CorrelationId::of(&req);
    req.extensions_mut().insert(id.clone());
    let clients = req.app_data::<web::Data<Clients>>().cloned().expect("every app is built with its clients");
    let admitted = if is_served { admit(req.request(), &clients) } else { Err(Error::MalformedRequest) };
    if let Some(connection) = &connection {
        connection.written().await;
    }
    let is_unwanted = admitted.is_err() || matches!(*req.method(), Method::GET | Method::HEAD);
    if let Some(connection) = connection.as_ref().filter(|_| announced != Announced::Nothing && is_unwanted)
        && body::skip(req.take_payload()).await
    {
        connection.received();
    }
    let mut res = match &admitted {
        Ok(_) => next.call(req).await?,
        Err(error) => req.into_response(error.error_response()),
    };
    let taken = match take(&res) {
        Ok(taken) => taken,
        Err(error) => {
            res = ServiceResponse::new(res.request().clone(), error.error_response());
            None
        }
    };
    if connection.is_some_and(|connection| connection.answer(taken)) {
        res.response_mut().head_mut().set_connection_type(ConnectionType::Close);
    }

    if let Some(Error::Internal(error)) = res.response().error().and_then(|error| error.as_error::<Error>()) {
        log::error!(correlation_id = id.as_str(), error:% = chain(error.as_ref()); "a request failed");
    }
    let headers = res.headers_mut();
    if let Ok(Some(allowance)) = &admitted {
        allowance.tell(headers);
    }
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
