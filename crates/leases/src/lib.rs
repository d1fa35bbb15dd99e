#![doc = include_str!("../README.md")]

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use storage::{
    Database,
    leases::{self, Claimed, Shortened},
};
use telemetry::{ClockSetBack, emit};
use uuid::Uuid;

/// The leases of one process on some of a service's resources, which all its processes share evenly.
pub struct Leases {
    database: Database,
    service: String,
    holder: String,
    ttl: Duration,
    held: BTreeSet<String>,
}

/// How things stand after a round.
#[derive(Debug, PartialEq, Eq)]
pub struct Round {
    /// Processes that share the resources, this one included.
    pub members: usize,
    /// Taken just now.
    pub gained: Vec<Claimed>,
    /// Lost to others, who took this process for dead.
    pub lost: Vec<String>,
    /// More than its share: to be given back by [`Leases::release`] when the work on them is finished.
    pub surplus: Vec<String>,
    /// Until when the leases held are certain.
    pub until: Instant,
}

impl Leases {
    /// None yet, for a process of the service. Its name as a holder is new. The database is to be
    /// [one that nobody else uses](Database::open_alone): leases are kept also while every other connection is in use.
    pub fn new(database: Database, service: &str, ttl: Duration) -> Self {
        Self { database, service: service.into(), holder: holder(), ttl, held: BTreeSet::new() }
    }

    /// This process's name.
    pub fn holder(&self) -> &str {
        &self.holder
    }

    /// What it holds.
    pub fn held(&self) -> &BTreeSet<String> {
        &self.held
    }

    /// Renews what it holds, and takes what is free as far as its share goes. To be called several times in the time that
    /// a lease runs.
    ///
    /// # Errors
    /// The database's. Leases that were held are then certain only as long as the last round said.
    pub fn round(&mut self, resources: &[String]) -> storage::Result<Round> {
        let began = Instant::now();
        let Self { database, service, holder, ttl, held } = self;
        let names: Vec<&str> = resources.iter().map(String::as_str).collect();
        let (shortened, members, rank, renewed, claimed) = database.transaction_unheld(*ttl, *ttl / 4, |conn| {
            let shortened = leases::shorten(conn, service, *ttl, &names)?;
            let members = leases::attend(conn, service, holder, *ttl)?;
            let rank = members.iter().position(|member| member == holder).unwrap_or_default();
            let renewed = leases::renew(conn, holder, *ttl)?;
            let share = share(resources.len(), members.len(), rank);
            let missing = share.saturating_sub(renewed.len());
            let others: Vec<&str> =
                resources.iter().filter(|resource| !renewed.contains(resource)).map(String::as_str).collect();
            let claimed = if missing > 0 {
                leases::claim(conn, holder, *ttl, &others, i64::try_from(missing).unwrap_or(i64::MAX))?
            } else {
                Vec::new()
            };
            Ok((shortened, members.len(), rank, renewed, claimed))
        })?;
        if shortened != Shortened::default() {
            let Shortened { leases, members } = shortened;
            emit(ClockSetBack { of: service, leases: leases as u64, members: members as u64, waits: 0 });
        }
        let renewed: BTreeSet<String> = renewed.into_iter().collect();
        let lost = held.difference(&renewed).cloned().collect();
        *held = renewed;
        held.extend(claimed.iter().map(|claimed| claimed.resource.clone()));
        let surplus = surplus(held, resources, share(resources.len(), members, rank));
        Ok(Round { members, gained: claimed, lost, surplus, until: began + *ttl })
    }

    /// Gives some back: others may take them at once.
    ///
    /// # Errors
    /// The database's. Then they run out by themselves, unless another round renews them.
    pub fn release(&mut self, resources: &[String]) -> storage::Result<()> {
        let names: Vec<&str> = resources.iter().map(String::as_str).collect();
        self.database.transaction_unheld(self.ttl, self.ttl / 4, |conn| leases::release(conn, &self.holder, &names))?;
        resources.iter().for_each(|resource| _ = self.held.remove(resource));
        Ok(())
    }

    /// Leaves the service's processes, but keeps what it holds: others' shares grow, and it takes nothing more.
    pub fn retire(&self) -> storage::Result<()> {
        self.database
            .transaction_unheld(self.ttl, self.ttl / 4, |conn| leases::depart(conn, &self.service, &self.holder))
    }

    /// Renews what it holds, and takes nothing.
    pub fn keep(&self) -> storage::Result<()> {
        self.database
            .transaction_unheld(self.ttl, self.ttl / 4, |conn| leases::renew(conn, &self.holder, self.ttl))
            .map(drop)
    }

    /// Gives all back, and leaves the service's processes.
    ///
    /// # Errors
    /// The database's. Then they run out by themselves.
    pub fn leave(self) -> storage::Result<()> {
        self.database
            .transaction_unheld(self.ttl, self.ttl / 4, |conn| leases::leave(conn, &self.service, &self.holder))
    }
}

/// A name for this process that none has had before and that an operator recognises: host, process id, and something of
/// its own.
fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let nonce = Uuid::new_v4().simple().to_string();
    let host = Some(host.trim()).filter(|host| !host.is_empty()).unwrap_or("host");
    format!("{host}-{}-{}", std::process::id(), &nonce[..6])
}

/// How many of the resources are for the member of this rank: shares differ by one at most, and add up.
fn share(resources: usize, members: usize, rank: usize) -> usize {
    let members = members.max(1);
    resources / members + usize::from(rank < resources % members)
}

/// What is held beyond the share: what there isn't any more, and then the last ones.
fn surplus(held: &BTreeSet<String>, resources: &[String], share: usize) -> Vec<String> {
    let (present, gone): (Vec<_>, Vec<_>) = held.iter().cloned().partition(|held| resources.contains(held));
    gone.into_iter().chain(present.into_iter().skip(share)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_add_up() {
        for resources in [0, 1, 7, 16, 32] {
            for members in 1..=20 {
                let shares: Vec<_> = (0..members).map(|rank| share(resources, members, rank)).collect();
                assert_eq!(shares.iter().sum::<usize>(), resources);
                assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
            }
        }
    }

    #[test]
    fn what_is_beyond_the_share_is_given_back_and_first_what_there_is_no_more() {
        let names = |numbers: &[u32]| numbers.iter().map(|n| format!("s/{n}")).collect::<Vec<_>>();
        let held = |numbers: &[u32]| names(numbers).into_iter().collect::<BTreeSet<_>>();
        let resources = names(&[0, 1, 2, 3]);
        for (has, share, expected) in [
            (&[0, 2][..], 2, &[][..]),
            (&[0, 2, 3], 2, &[3]),
            (&[0, 1, 2, 3], 0, &[0, 1, 2, 3]),
            (&[0, 1, 8, 9], 2, &[8, 9]),
            (&[0, 1, 8, 9], 1, &[8, 9, 1]),
        ] {
            assert_eq!(surplus(&held(has), &resources, share), names(expected), "{has:?}, {share}");
        }
    }
}
