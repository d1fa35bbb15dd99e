//! Account events: accepting them, and what must hold of them.

use crate::TestDatabase;
use domain::stream::{ACCOUNT_EVENT, AccountId, Payload};
use storage::{account_effects, audit::Finding, stream_audit, streams};

impl TestDatabase {
    /// Accepts events in this order, in one transaction: of each the account, and the payload as JSON text.
    ///
    /// # Panics
    /// When the database doesn't take them.
    pub fn append_events(&self, events: &[(impl AsRef<str>, impl AsRef<str>)]) {
        let parse = |(account, payload): &(_, _)| {
            let (account, payload): (&str, &str) = (AsRef::as_ref(account), AsRef::as_ref(payload));
            (AccountId::parse(account).expect("an account id"), Payload::parse(payload).expect("JSON"))
        };
        let events: Vec<_> = events.iter().map(parse).collect();
        let append = self.database().transaction(|conn| streams::append(conn, ACCOUNT_EVENT, &events, None));
        append.expect("the events are committed");
    }

    /// Events that are still to take effect; those of parked accounts don't count.
    ///
    /// # Panics
    /// When the query fails.
    pub fn events_waiting(&self) -> i64 {
        self.ask(|conn| stream_audit::backlog(conn, ACCOUNT_EVENT, "")).waiting
    }

    /// What the audit has to say against the events and their effects: those that are lost, doubled, out of order, or
    /// still on their way.
    ///
    /// # Panics
    /// When it can't run.
    pub fn event_errors(&self) -> Vec<String> {
        let effects = account_effects::CHECKS;
        let audit = self.database().transaction(|conn| stream_audit::run(conn, ACCOUNT_EVENT, "", effects, |_| {}));
        let (_, findings) = audit.expect("the audit runs");
        let errors = findings.into_iter().filter(|finding| finding.count > 0);
        errors.map(|Finding { check, count, examples }| format!("{count} {check}: {examples:?}")).collect()
    }
}
