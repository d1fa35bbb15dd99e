//! Users.

use crate::{
    body::{Form, Json},
    error::Error,
    fields::{self, Fields, LIST_MAX, Value, text},
    gateway::Gateway,
    shares::Subject,
    tweets::Tweet,
};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use domain::{
    UserId,
    values::{Contact, EMAIL_MAX, Invalid, LOGIN_MAX, Login, PHONE_MAX, visible},
    wire_time,
};
use password::Password;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema, schema_for};
use serde::Serialize;
use serde_json::json;
use storage::{subscriptions, tweets, users};

const AGE_MAX: i16 = 150;
const ROLES_MAX: usize = 16;
const ROLE_MAX: usize = 32;

/// A user to be made.
#[derive(JsonSchema)]
#[schemars(title = "User", rename_all = "camelCase", deny_unknown_fields)]
struct NewUser {
    /// Unique; letters and digits, of one script or of such as are written together, and `. _ - + '`. Kept in Unicode's
    /// normalization form C.
    #[schemars(with = "String", length(min = 1, max = LOGIN_MAX), pattern(r"^[^\s\p{C}]+$"))]
    login: Login,
    #[schemars(flatten, schema_with = "contact_schema")]
    contact: Contact,
    /// Not one that is among the first guesses. Kept as an argon2id hash.
    #[schemars(with = "String", length(min = password::MIN, max = password::MAX), extend("writeOnly" = true))]
    password: Password,
    /// In years.
    #[schemars(range(min = 0, max = AGE_MAX), extend("type" = "integer"))]
    age: Option<i16>,
    /// True where it isn't given.
    #[schemars(extend("type" = "boolean"))]
    is_active: Option<bool>,
    /// Names of roles; none where they aren't given.
    #[schemars(length(max = ROLES_MAX), inner(length(min = 1, max = ROLE_MAX)), extend("type" = "array"))]
    roles: Option<Vec<String>>,
}

fn contact_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "properties": {
            "email": {
                "description": "Where notifications go, if by e-mail.",
                "type": "string", "format": "email", "maxLength": EMAIL_MAX,
            },
            "phone": {
                "description": "Where notifications go, if by SMS: E.164.",
                "type": "string", "maxLength": PHONE_MAX, "pattern": r"^\+[1-9][0-9]{1,14}$",
            },
        },
        "oneOf": [{"required": ["email"]}, {"required": ["phone"]}],
    })
}

impl NewUser {
    fn parse(mut fields: Fields) -> Result<Self, Error> {
        let login = fields.required("login", text(Login::parse_new));
        let contact = fields.contact();
        let address = match &contact {
            Some(Contact::Email(email)) => email.as_str(),
            Some(Contact::Phone(phone)) => phone.as_str(),
            None => "",
        };
        let known = [login.as_ref().map_or("", Login::as_str), address];
        let password = fields.required("password", text(|text| Password::parse(text, &known)));
        let age = fields.optional("age", fields::between(0..=AGE_MAX.into()));
        let is_active = fields.optional("isActive", fields::truth);
        let roles = fields.optional("roles", roles);
        let (login, contact, password) = fields.finish((login, contact, password))?;
        Ok(Self { login, contact, password, age: age.and_then(|age| age.try_into().ok()), is_active, roles })
    }
}

fn roles(value: Value) -> Result<Vec<String>, Invalid> {
    let refused =
        || Invalid(format!("must be a list of at most {ROLES_MAX} visible strings of 1 to {ROLE_MAX} characters"));
    let Value::Json(json) = value else { return Err(refused()) };
    let roles: Vec<String> = serde_json::from_str(json.get()).map_err(|_| refused())?;
    let is_role =
        |role: &String| role.chars().count() <= ROLE_MAX && !role.contains(char::is_control) && visible(role).is_ok();
    match roles.len() <= ROLES_MAX && roles.iter().all(is_role) {
        true => Ok(roles),
        false => Err(refused()),
    }
}

/// A user in an answer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct User {
    id: UserId,
    login: String,
    avatar_link: Option<String>,
    roles: serde_json::Value,
    #[serde(with = "wire_time")]
    created_at: DateTime<Utc>,
    #[serde(with = "wire_time")]
    updated_at: DateTime<Utc>,
    phone: Option<String>,
    email: Option<String>,
}

impl From<users::User> for User {
    fn from(user: users::User) -> Self {
        let users::User { id, login, avatar_link, roles, created_at, updated_at, phone, email, .. } = user;
        Self { id, login, avatar_link, roles, created_at, updated_at, phone, email }
    }
}

/// The user at the other side of a subscription.
#[derive(Serialize)]
struct Party {
    id: UserId,
    login: String,
}

impl From<subscriptions::Party> for Party {
    fn from(party: subscriptions::Party) -> Self {
        Self { id: party.id, login: party.login }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct UserInFull {
    #[serde(flatten)]
    user: User,
    tweets: Vec<Tweet>,
    subscription_followers: Vec<Party>,
    subscription_authors: Vec<Party>,
}

pub(crate) async fn create(gateway: web::Data<Gateway>, Json(fields): Json) -> Result<HttpResponse, Error> {
    let parse = move |memory: &mut password::Memory| {
        let new = NewUser::parse(fields)?;
        let password_hash = new.password.hash(memory).map_err(|error| Error::Internal(error.into()))?;
        Ok::<_, Error>((new, password_hash))
    };
    let (NewUser { login, contact, age, is_active, roles, .. }, password_hash) = gateway.hash(parse).await??;
    insert(&gateway, login.clone(), move |conn| {
        users::create(
            conn,
            &users::NewUser {
                login: &login,
                contact: &contact,
                password_hash: Some(&password_hash),
                age,
                is_active: is_active.unwrap_or(true),
                roles: roles.as_deref().unwrap_or_default(),
            },
        )
    })
    .await
}

pub(crate) async fn create_plain(gateway: web::Data<Gateway>, Form(mut fields): Form) -> Result<HttpResponse, Error> {
    let login = fields.required("login", text(Login::parse_new));
    let contact = fields.contact();
    let (login, contact) = fields.finish((login, contact))?;
    insert(&gateway, login.clone(), move |conn| {
        users::create(
            conn,
            &users::NewUser {
                login: &login,
                contact: &contact,
                password_hash: None,
                age: None,
                is_active: true,
                roles: &[],
            },
        )
    })
    .await
}

async fn insert(
    gateway: &Gateway,
    login: Login,
    create: impl FnMut(&mut storage::PgConnection) -> storage::Result<users::User> + Send + 'static,
) -> Result<HttpResponse, Error> {
    let user = gateway.write(&[Subject::Login(login.as_str())], gateway.soon(), create).await?;
    Ok(HttpResponse::Created().json(User::from(user)))
}

pub(crate) async fn get(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    if fields.has("id") {
        let id = fields.required("id", fields::id::<UserId>);
        let (id,) = fields.finish((id,))?;
        in_full(&gateway, id).await
    } else {
        let (offset, limit) = fields::page(&mut fields);
        fields.finish(())?;
        let users = gateway.read(move |conn| users::page(conn, offset, limit)).await?;
        Ok(HttpResponse::Ok().json(json!({"users": users.into_iter().map(User::from).collect::<Vec<_>>()})))
    }
}

async fn in_full(gateway: &Gateway, id: UserId) -> Result<HttpResponse, Error> {
    let (user, tweets, followers, authors) = gateway
        .read(move |conn| {
            Ok((
                users::by_id(conn, id)?,
                tweets::of_author(conn, id, LIST_MAX)?,
                subscriptions::followers_of(conn, id, LIST_MAX)?,
                subscriptions::authors_of(conn, id, LIST_MAX)?,
            ))
        })
        .await?;
    Ok(HttpResponse::Ok().json(UserInFull {
        user: user.into(),
        tweets: tweets.into_iter().map(Tweet::from).collect(),
        subscription_followers: followers.into_iter().map(Party::from).collect(),
        subscription_authors: authors.into_iter().map(Party::from).collect(),
    }))
}

pub(crate) async fn get_by_login(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let login = fields.required("login", text(Login::parse));
    let (login,) = fields.finish((login,))?;
    let find = move |conn: &mut _| match (users::by_login(conn, login.as_str()), login.composed()) {
        (Err(storage::Error::NotFound(_)), Some(composed)) => users::by_login(conn, composed.as_str()),
        (found, _) => found,
    };
    let user = gateway.read(find).await?;
    Ok(HttpResponse::Ok().json(json!({"user": User::from(user)})))
}

pub(crate) async fn rename(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    rename_by(&gateway, Fields::parameters(&req)).await
}

pub(crate) async fn rename_by_form(gateway: web::Data<Gateway>, Form(fields): Form) -> Result<HttpResponse, Error> {
    rename_by(&gateway, fields).await
}

async fn rename_by(gateway: &Gateway, mut fields: Fields) -> Result<HttpResponse, Error> {
    let id = fields.required("id", fields::id::<UserId>);
    let login = fields.required("login", text(Login::parse_new));
    let (id, login) = fields.finish((id, login))?;
    gateway.write(&[Subject::User(id)], gateway.soon(), move |conn| users::rename(conn, id, &login)).await?;
    Ok(HttpResponse::Ok().json(json!({"success": true})))
}

/// The id is in the path or the query.
pub(crate) async fn delete(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let id = fields.required("id", fields::id::<UserId>);
    let (id,) = fields.finish((id,))?;
    gateway.write(&[Subject::User(id)], gateway.soon(), move |conn| users::delete(conn, id)).await?;
    Ok(HttpResponse::Ok().json(json!({"success": true})))
}

pub(crate) async fn schema() -> HttpResponse {
    HttpResponse::Ok().content_type("application/schema+json").json(schema_for!(NewUser))
}
