//! Following and leaving.

use crate::{
    error::Error,
    fields::{self, Fields},
    gateway::Gateway,
};
use actix_web::{HttpRequest, HttpResponse, web};
use domain::UserId;
use serde_json::json;
use storage::subscriptions;

fn parties(req: &HttpRequest) -> Result<(UserId, UserId), Error> {
    let mut fields = Fields::parameters(req);
    let author = fields.required("author", fields::id);
    let follower = fields.required("follower", fields::id);
    fields.finish((author, follower))
}

pub(crate) async fn create(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let (author, follower) = parties(&req)?;
    gateway.write(gateway.soon(), move |conn| subscriptions::create(conn, author, follower)).await?;
    Ok(HttpResponse::Created().json(json!({"success": true})))
}

pub(crate) async fn delete(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let (author, follower) = parties(&req)?;
    gateway.write(gateway.soon(), move |conn| subscriptions::remove(conn, author, follower)).await?;
    Ok(HttpResponse::Ok().json(json!({"success": true})))
}
