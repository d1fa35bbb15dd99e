//! Following and leaving.

use crate::{
    error::Error,
    fields::{self, Fields},
    gateway::Gateway,
    shares::Subject,
};
use actix_web::{HttpRequest, HttpResponse, web};
use domain::UserId;
use serde_json::json;
use storage::subscriptions;

/// The author and the follower.
fn parties(fields: &mut Fields) -> (Option<UserId>, Option<UserId>) {
    (fields.required("author", fields::id), fields.required("follower", fields::id))
}

pub(crate) async fn create(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let parties = parties(&mut fields);
    if let (Some(author), Some(follower)) = parties
        && author == follower
    {
        fields.refuse("follower", "must not be the author: nobody follows themselves");
    }
    let (author, follower) = fields.finish(parties)?;
    let create = move |conn: &mut _| subscriptions::create(conn, author, follower);
    gateway.write(&[Subject::User(author)], gateway.soon(), create).await?;
    Ok(HttpResponse::Created().json(json!({"success": true})))
}

pub(crate) async fn delete(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let parties = parties(&mut fields);
    let (author, follower) = fields.finish(parties)?;
    let remove = move |conn: &mut _| subscriptions::remove(conn, author, follower);
    gateway.write(&[Subject::User(author)], gateway.soon(), remove).await?;
    Ok(HttpResponse::Ok().json(json!({"success": true})))
}
