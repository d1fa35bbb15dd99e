//! Follower imports, in the request or by a worker.

use crate::{
    access::CorrelationId,
    body::Form,
    error::Error,
    fields::{self, Fields, text},
    gateway::Gateway,
    shares::Subject,
};
use actix_web::{HttpRequest, HttpResponse, web};
use domain::{
    ImportId, UserId,
    message::{AddFollowers, Message as _},
    values::ImportPlan,
};
use serde_json::json;
use storage::{
    imports::{self, Import},
    outbox,
};
use telemetry::ImportProgressed;
use uuid::Uuid;

/// What is asked for, by whichever path.
struct Order {
    author: UserId,
    plan: ImportPlan,
    by_worker: bool,
}

impl Order {
    /// The paths call the author and the prefix differently.
    fn parse(mut fields: Fields, author: &str, prefix: &str, gateway: &Gateway) -> Result<Self, Error> {
        let author = fields.required(author, fields::id);
        let by_worker = fields.optional("async", fields::flag).unwrap_or(false);
        let logins = fields.required(prefix, text(|text| Ok(text.to_owned())));
        let count = fields.required("count", fields::whole);
        let limit = if by_worker { gateway.http.import_async_limit } else { gateway.http.import_sync_limit };
        let plan = logins.zip(count).and_then(|(logins, count)| {
            let refused = |(field, invalid): (&str, domain::values::Invalid)| {
                fields.refuse(if field == "prefix" { prefix } else { field }, invalid.0);
            };
            ImportPlan::parse_new(&logins, count, limit).map_err(refused).ok()
        });
        let (author, plan) = fields.finish((author, plan))?;
        Ok(Self { author, plan, by_worker })
    }
}

pub(crate) async fn add(
    gateway: web::Data<Gateway>,
    correlation_id: CorrelationId,
    req: HttpRequest,
    Form(mut fields): Form,
) -> Result<HttpResponse, Error> {
    fields.add_all(Fields::path(&req));
    let order = Order::parse(fields, "id", "followerLoginPrefix", &gateway)?;
    let answer = if order.by_worker {
        let count = order.plan.count();
        json!({"count": count, "importId": enqueue(&gateway, &correlation_id, order).await?})
    } else {
        json!({"count": run(&gateway, &correlation_id, order).await?.created})
    };
    Ok(HttpResponse::Ok().json(answer))
}

pub(crate) async fn add_by_form(
    gateway: web::Data<Gateway>,
    correlation_id: CorrelationId,
    Form(fields): Form,
) -> Result<HttpResponse, Error> {
    let order = Order::parse(fields, "userId", "followersLogin", &gateway)?;
    let answer = if order.by_worker {
        json!({"success": true, "importId": enqueue(&gateway, &correlation_id, order).await?})
    } else {
        json!({"created": run(&gateway, &correlation_id, order).await?.created})
    };
    Ok(HttpResponse::Ok().json(answer))
}

/// Leaves the import to a worker.
async fn enqueue(gateway: &Gateway, correlation_id: &CorrelationId, order: Order) -> Result<ImportId, Error> {
    let Order { author, plan, .. } = order;
    let correlation_id = correlation_id.clone();
    let open = move |conn: &mut _| {
        let import = imports::open(conn, &Uuid::new_v4().to_string(), author, &plan)?;
        let message = AddFollowers {
            user_id: author,
            follower_login: plan.prefix().into(),
            count: plan.count().into(),
            import_id: Some(import.id),
        };
        outbox::push(conn, &[message.envelope().correlated(Some(correlation_id.as_str()))])?;
        Ok(import.id)
    };
    gateway.write(&[Subject::User(author)], gateway.soon(), open).await
}

/// Does the import in the request, step by step, each in a transaction of its own.
///
/// Its request key stands for what is asked for, so when it's interrupted (the client went away, the gateway stopped, it
/// took too long), the same request again goes on where it was left. Once it's over it gives the key up, and the same
/// request is a new import, which finds its logins taken.
async fn run(gateway: &Gateway, correlation_id: &CorrelationId, order: Order) -> Result<Import, Error> {
    let Order { author, plan, .. } = order;
    let deadline = gateway.later();
    let subjects = [Subject::Rows, Subject::User(author)];
    let asked_for = format!("{author} {} {}", plan.count(), plan.prefix());
    let key = format!("request:{}", Uuid::new_v5(&Uuid::NAMESPACE_OID, asked_for.as_bytes()));
    let size = gateway.http.import_step;
    let mut import = gateway.write(&subjects, deadline, move |conn| imports::open(conn, &key, author, &plan)).await?;
    while !import.is_over() {
        let id = import.id;
        let step = move |conn: &mut _| {
            let import = imports::step(conn, id, size)?;
            imports::release(conn, id)?;
            Ok(import)
        };
        let next = gateway.write(&subjects, deadline, step).await?;
        if next.state == "failed" {
            // The author was deleted meanwhile.
            return Err(Error::NotFound("user"));
        }
        let growth = |then: i32, now: i32| u64::try_from(now - then).unwrap_or(0);
        telemetry::emit(ImportProgressed {
            import_id: &id,
            correlation_id: Some(correlation_id.as_str()),
            requested: growth(0, next.requested),
            done: growth(0, next.next_index),
            created: growth(import.created, next.created),
            skipped: growth(import.skipped, next.skipped),
        });
        import = next;
    }
    Ok(import)
}

pub(crate) async fn get(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let id = fields.required("importId", fields::id::<ImportId>);
    let (id,) = fields.finish((id,))?;
    let Import { requested, created, skipped, state, error, .. } =
        gateway.read(move |conn| imports::get(conn, id)).await?;
    Ok(HttpResponse::Ok().json(json!({
        "requested": requested, "created": created, "skipped": skipped, "state": state, "error": error,
    })))
}
