//! Asking before something is removed for good.

use anyhow::{Context as _, bail, ensure};
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

/// The word that says it beforehand.
#[derive(clap::Args)]
pub(crate) struct Consent {
    /// Don't ask for confirmation
    #[arg(long)]
    yes: bool,
}

impl Consent {
    /// Has `what` agreed to, on the terminal unless it was already.
    ///
    /// # Errors
    /// When it isn't, or there's no terminal.
    pub(crate) fn obtain(&self, what: &str) -> anyhow::Result<()> {
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            bail!("{what}; nothing was changed: pass --yes to do it, or --dry-run to see what it would do");
        }
        eprint!("{what}. Go on? [y/N] ");
        io::stderr().flush().context("can't ask")?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).context("can't read the answer")?;
        ensure!(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()), "nothing was changed");
        Ok(())
    }
}
