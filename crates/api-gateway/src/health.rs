//! Whether the process lives, and whether it can serve.

use crate::{error::Error, gateway::Gateway};
use actix_web::{HttpResponse, web};
use serde_json::json;

pub(crate) async fn live() -> HttpResponse {
    HttpResponse::Ok().json(json!({"status": "ok"}))
}

pub(crate) async fn ready(gateway: web::Data<Gateway>) -> Result<HttpResponse, Error> {
    gateway.check().await?;
    Ok(live().await)
}
