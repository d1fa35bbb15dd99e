mod erase;
mod export;

use crate::{Outcome, context::Context};
use anyhow::{Context as _, ensure};
use console::Term;
use domain::values::{Contact, Email, Login, Phone};
use password::Password;
use std::io::{self, Write};
use storage::users::{self, NewUser};

/// Users
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Make a user and print the id
    Create(Create),
    Export(export::Args),
    Erase(erase::Args),
}

#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl user create --login ann --email ann@example.com
  fleetctl user create --login ben --phone +14155550123 --role admin --password
  fleetctl user create --login ben --phone +14155550123 --password <secret-file")]
pub(crate) struct Create {
    /// 1 to 32 characters, not yet taken
    #[arg(long, value_parser = Login::parse_new)]
    login: Login,
    /// Where notifications go, if by e-mail
    #[arg(long, value_parser = Email::parse)]
    email: Option<Email>,
    /// Where notifications go, if by SMS: E.164, such as +14155550123
    #[arg(long, value_parser = Phone::parse, conflicts_with = "email", required_unless_present = "email")]
    phone: Option<Phone>,
    /// Read a password: from the terminal without showing it, else one line of the standard input. Without a password
    /// the user can't log in
    #[arg(long)]
    password: bool,
    /// A role; may be given several times
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
}

pub(crate) fn run(command: Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let create = match command {
        Command::Create(create) => create,
        Command::Export(args) => return export::run(&args, context, out),
        Command::Erase(args) => return erase::run(&args, context, out),
    };
    let contact = match (create.email, create.phone) {
        (Some(email), _) => Contact::Email(email),
        (_, Some(phone)) => Contact::Phone(phone),
        (None, None) => unreachable!("the arguments require one of them"),
    };
    let database = context.database()?;
    let address = match &contact {
        Contact::Email(email) => email.as_str(),
        Contact::Phone(phone) => phone.as_str(),
    };
    let password_hash = match create.password {
        true => {
            let password = read_password(&[create.login.as_str(), address])?;
            Some(password.hash(&mut password::Memory::default()).context("can't hash the password")?)
        }
        false => None,
    };
    let new = NewUser {
        login: &create.login,
        contact: &contact,
        password_hash: password_hash.as_deref(),
        age: None,
        is_active: true,
        roles: &create.roles,
    };
    let user = users::create(&mut *database.connection()?, &new)?;
    writeln!(out, "{}", user.id)?;
    Ok(Outcome::Done)
}

fn read_password(known: &[&str]) -> anyhow::Result<Password> {
    let term = Term::stderr();
    let password = if io::IsTerminal::is_terminal(&io::stdin()) && term.is_term() {
        let ask = |prompt: &str| {
            term.write_str(prompt)?;
            term.read_secure_line()
        };
        let password = ask("Password: ").context("can't read the password")?;
        let again = ask("Once more: ").context("can't read the password")?;
        ensure!(password == again, "the two passwords differ");
        password
    } else {
        let mut line = String::new();
        io::stdin().read_line(&mut line).context("can't read the password")?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    Password::parse(&password, known).map_err(|invalid| anyhow::anyhow!("the password {invalid}"))
}
