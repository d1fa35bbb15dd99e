//! Which path and method leads where.

use crate::{
    access, avatars, error::Error, events, feeds, health, imports, messages, results, subscriptions, tweets, users,
};
use actix_web::{
    FromRequest, Handler, HttpResponse, Resource, Responder, guard,
    http::Method,
    web::{self, ServiceConfig},
};
use std::future::ready;

pub(crate) fn configure(app: &mut ServiceConfig) {
    // The router tries them in this order, so what is asked for most comes first.
    let paths = [
        path("/api/v1/get-feed/{id}").get(feeds::newest),
        path("/api/v2/feed/{id}").get(feeds::page),
        path("/api/v1/post-tweet").on(Method::POST, tweets::post),
        path("/api/v1/get-tweet").get(tweets::list),
        path("/api/v1/tweet/{id}").on(Method::DELETE, tweets::delete),
        path("/api/v1/event").get(events::get).on(Method::POST, events::post),
        path("/api/v1/event/{accountId}").get(events::get),
        path("/api/v1/message").get(messages::get).on(Method::POST, messages::post),
        path("/api/v1/create-subscription/{author}/{follower}").on(Method::POST, subscriptions::create),
        path("/api/v1/subscription/{author}/{follower}").on(Method::DELETE, subscriptions::delete),
        path("/api/v2/user").on(Method::POST, users::create),
        path("/api/v1/user")
            .get(users::get)
            .on(Method::POST, users::create_plain)
            .on(Method::PATCH, users::rename_by_form)
            .on(Method::DELETE, users::delete),
        path("/api/v1/user/{id}").on(Method::PATCH, users::rename).on(Method::DELETE, users::delete),
        path("/api/v1/get-user-by-login").get(users::get_by_login),
        path("/api/v1/get-user-by-login/{login}").get(users::get_by_login),
        path("/api/v1/get-json-schema/user").get(users::schema),
        path("/api/v1/update-user-avatar-link/{id}").on(Method::POST, avatars::put),
        path("/avatar/{id}/{file}").get(avatars::get),
        path("/api/v1/add-followers").on(Method::POST, imports::add_by_form),
        path("/api/v1/add-followers/{id}").on(Method::POST, imports::add),
        path("/api/v1/follower-import/{importId}").get(imports::get),
        path("/api/v1/results").get(results::get),
        path("/results").get(results::page),
        path("/results/page.css").get(results::style),
        path("/results/page.js").get(results::script),
        path("/health/live").get(health::live),
        path("/health/ready").get(health::ready),
    ];
    for path in paths {
        app.service(path.resource());
    }
    app.default_service(web::to(|| ready(Err::<HttpResponse, _>(Error::NoSuchPath))));
}

/// A path and what its methods lead to.
struct Path {
    resource: Resource,
    allow: Vec<Method>,
}

fn path(pattern: &'static str) -> Path {
    Path { resource: web::resource(pattern).app_data(access::Route(pattern)), allow: Vec::new() }
}

impl Path {
    fn on<F, Args>(mut self, method: Method, handler: F) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.resource = self.resource.route(web::method(method.clone()).to(handler));
        self.allow.push(method);
        self
    }

    /// GET, and HEAD with it: the server leaves the body out.
    fn get<F, Args>(mut self, handler: F) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        let either = guard::Any(guard::Get()).or(guard::Head());
        self.resource = self.resource.route(web::route().guard(either).to(handler));
        self.allow.extend([Method::GET, Method::HEAD]);
        self
    }

    /// Any other method is told which there are.
    fn resource(self) -> Resource {
        let allow = self.allow.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
        let refuse = move || ready(Err::<HttpResponse, _>(Error::MethodNotAllowed { allow: allow.clone() }));
        self.resource.default_service(web::to(refuse))
    }
}
