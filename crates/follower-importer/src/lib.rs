#![doc = include_str!("../README.md")]

use anyhow::anyhow;
use domain::{
    Failure, ImportId,
    message::{AddFollowers, Message as _},
    topology::queue,
    values::ImportPlan,
};
use process::Program;
use serde::Deserialize;
use service::Service;
use storage::{
    Database, Error, PgConnection,
    imports::{self, Import},
    users,
};
use telemetry::ImportProgressed;
use worker::{BatchHandler, Consuming, Item, Outgoing, Received, Step};

/// The service's name.
pub const SERVICE: &str = "follower-importer";

/// The service as a program.
pub const PROGRAM: Program =
    Program::new(SERVICE, "Makes users in bulk and lets them follow an author: queue add_followers.", run);

/// The sections of the settings that are this service's own.
#[derive(Deserialize)]
struct Settings {
    follower_importer: Section,
}

#[derive(Deserialize)]
struct Section {
    #[serde(flatten)]
    consuming: Consuming,
    step: u32,
    limit: u32,
}

/// Runs the service until it's told to stop.
///
/// # Errors
/// When the settings can't be used.
pub fn run() -> anyhow::Result<()> {
    let (service, Settings { follower_importer: Section { consuming, step, limit } }) = Service::begin(SERVICE)?;
    service.consume(vec![queue::ADD_FOLLOWERS.into()], consuming, |database| Importer::new(database, step, limit))
}

/// The handler.
pub struct Importer {
    database: Database,
    step: u32,
    limit: u32,
}

impl Importer {
    /// Making `step` users in one transaction, and refusing imports of more than `limit`.
    pub fn new(database: Database, step: u32, limit: u32) -> Self {
        Self { database, step, limit }
    }

    fn import(&self, message: &AddFollowers, received: &Received, step: &Step) -> Result<(), Failure> {
        let plan = ImportPlan::new(&message.follower_login, message.count, self.limit);
        let plan = plan.map_err(|(field, invalid)| {
            let field = if field == "prefix" { "followerLogin" } else { field };
            self.give_up(message.import_id, Failure::permanent(format!("{field} {invalid}")))
        })?;
        let import = self.database.transaction(|conn| match message.import_id {
            Some(id) => imports::get(conn, id).map(Some),
            None => open(conn, message, received, &plan),
        })?;
        // Nobody is left who could be followed.
        let Some(mut import) = import else { return Ok(()) };
        while !import.is_over() {
            if step.is_stopping() {
                return Err(Failure::Unavailable(anyhow!("stopping; the import goes on from its last step")));
            }
            let before = import;
            import = self
                .database
                .transaction(|conn| imports::step(conn, before.id, self.step))
                .map_err(|error| self.give_up(Some(before.id), error.into()))?;
            step.renew();
            let count = |number: i32| u64::try_from(number).unwrap_or(0);
            telemetry::emit(ImportProgressed {
                import_id: &import.id,
                correlation_id: received.correlation_id.as_deref(),
                requested: count(import.requested),
                done: count(import.next_index),
                created: count(import.created - before.created),
                skipped: count(import.skipped - before.skipped),
            });
        }
        Ok(())
    }

    /// Notes in the import, where there is one, that nothing will come of it.
    fn give_up(&self, id: Option<ImportId>, failure: Failure) -> Failure {
        let (Some(id), Failure::Permanent(reason)) = (id, &failure) else { return failure };
        match self.database.transaction(|conn| imports::fail(conn, id, &format!("{reason:#}"))) {
            Ok(()) => failure,
            Err(error) => error.into(),
        }
    }
}

/// The import of another program's message; `None` where the author is deleted.
fn open(
    conn: &mut PgConnection,
    message: &AddFollowers,
    received: &Received,
    plan: &ImportPlan,
) -> Result<Option<Import>, Error> {
    match imports::open(conn, &request_key(message, received), message.user_id, plan) {
        Err(Error::NotFound(_)) => users::require_known(conn, &[message.user_id]).map(|()| None),
        result => result.map(Some),
    }
}

/// What makes another program's message the same again: its id, or without one what it asks for.
fn request_key(message: &AddFollowers, received: &Received) -> String {
    match &received.message_id {
        Some(id) => format!("message {id}"),
        None => format!("anonymous {} {} {}", message.user_id, message.count, message.follower_login),
    }
}

impl BatchHandler for Importer {
    type Message = AddFollowers;

    fn decode(&self, received: &Received) -> anyhow::Result<AddFollowers> {
        worker::kind(received, &[AddFollowers::TYPE])?;
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<AddFollowers>], _: &mut Outgoing, step: &Step) -> Result<(), Failure> {
        batch.iter().try_for_each(|item| self.import(&item.message, &item.received, step))
    }
}
