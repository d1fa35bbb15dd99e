use crate::{Outcome, context::Context, topology::Api};
use anyhow::{Context as _, ensure};
use domain::access::Permissions;
use management::Management;
use std::{collections::BTreeMap, env, io::Write};
use storage::rights::{self, Rights};

/// What each service may do in the database and at the broker
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Make a role and a user for each service, with what the service needs and nothing else
    ///
    /// Again changes nothing but what somebody has changed by hand. Each service's password is taken from the environment:
    /// API_GATEWAY_PASSWORD, OUTBOX_RELAY_PASSWORD and so on, the same one for PostgreSQL and RabbitMQ. It needs the owner of the
    /// tables, who may make roles, and an administrator of RabbitMQ's; without a management API, only the database's part is done.
    #[command(after_long_help = "\
Examples:
  fleetctl rights apply
  fleetctl rights apply --prefix staging")]
    Apply(Apply),
    /// Show them, as a table
    Show,
}

#[derive(clap::Args)]
pub(crate) struct Apply {
    #[command(flatten)]
    prefix: Prefix,
    #[command(flatten)]
    api: Api,
}

/// What the roles are called.
#[derive(clap::Args)]
pub(crate) struct Prefix {
    /// What the names of the services' roles and users begin with, where several fleets share a server
    #[arg(long, default_value = "murmuration", value_name = "PREFIX")]
    pub(crate) prefix: String,
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::Apply(args) => apply(args, context, out),
        Command::Show => show(out),
    }
}

fn apply(args: &Apply, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let prefix = &args.prefix.prefix;
    let passwords = passwords()?;
    let management = context.management(args.api.management_url());
    // First what may be refused without a change.
    let broker = match management {
        Some(url) => Some((Management::new(url)?, context.broker()?.vhost()?)),
        None => None,
    };
    let roles = context.database()?.transaction(|conn| rights::apply(conn, prefix, Some(&passwords)))?;
    writeln!(out, "{} roles in PostgreSQL", roles.len())?;
    let Some((management, vhost)) = broker else {
        writeln!(out, "note: RabbitMQ's users are as they were; set RABBITMQ_MANAGEMENT_URL")?;
        return Ok(Outcome::Done);
    };
    let mut users = 0;
    for (service, password) in &passwords {
        let Some(Permissions { configure, write, read }) = Permissions::of(service) else { continue };
        let user = rights::role(prefix, service);
        management.put_user(&user, password)?;
        management.set_permissions(&vhost, &user, &configure, &write, &read)?;
        users += 1;
    }
    writeln!(out, "{users} users at RabbitMQ")?;
    Ok(Outcome::Done)
}

/// Each service's, from the environment.
fn passwords() -> anyhow::Result<BTreeMap<String, String>> {
    let mut missing = Vec::new();
    let mut passwords = BTreeMap::new();
    for Rights { service, .. } in &rights::SERVICES {
        let variable = format!("{}_PASSWORD", service.replace('-', "_").to_uppercase());
        match env::var(&variable) {
            Ok(password) if !password.is_empty() => drop(passwords.insert((*service).to_owned(), password)),
            _ => missing.push(variable),
        }
    }
    ensure!(
        missing.is_empty(),
        "these passwords aren't set in the environment, and nothing was changed: {}",
        missing.join(", ")
    );
    Ok(passwords)
}

fn show(out: &mut dyn Write) -> anyhow::Result<Outcome> {
    writeln!(out, "| service | in PostgreSQL | at RabbitMQ: declare, bind, consume |\n|---|---|---|")?;
    for Rights { service, grants } in &rights::SERVICES {
        let grants: Vec<_> =
            grants.iter().map(|(privileges, on)| format!("{privileges} on `{}`", on.replace('"', ""))).collect();
        let names = |pattern: &str| {
            format!("`{}`", pattern.replace('|', "` `").trim_start_matches("^(").trim_end_matches(")$"))
        };
        let permissions = Permissions::of(service).map_or_else(
            || "nothing".to_owned(),
            |permissions| {
                let write = if permissions.write.contains("amq") { "; publish to any queue" } else { "" };
                format!("{}{write}", names(&permissions.read.replace("(ms|s|m)", "…")))
            },
        );
        writeln!(out, "| `{service}` | {} | {permissions} |", grants.join("<br>")).context("can't write the output")?;
    }
    Ok(Outcome::Done)
}
