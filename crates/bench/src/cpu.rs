//! Processor time that processes have taken.

use anyhow::Context as _;
use diesel::{PgConnection, RunQueryDsl as _, dsl::sql, sql_types::Integer};
use rustix::{param::clock_ticks_per_second, process::Pid};
use std::{fs, time::Duration};

/// What the kernel says of a process.
struct Stat {
    parent: u32,
    own: Duration,
    /// Of children that have ended.
    children: Duration,
}

fn stat(pid: impl std::fmt::Display) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before the last parenthesis may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let time = |at: usize| {
        Some(Duration::from_secs_f64((number(at)? + number(at + 1)?) as f64 / clock_ticks_per_second() as f64))
    };
    Some(Stat { parent: u32::try_from(number(1)?).ok()?, own: time(11)?, children: time(13)? })
}

/// Of a process.
pub(crate) fn of(pid: Pid) -> anyhow::Result<Duration> {
    Ok(stat(pid.as_raw_nonzero()).context("a process has ended, or the kernel doesn't tell its processor time")?.own)
}

/// Of this program.
pub(crate) fn own() -> anyhow::Result<Duration> {
    Ok(this_program()?.own)
}

/// Of the programs that this one has run, and that have ended.
pub(crate) fn ended_children() -> anyhow::Result<Duration> {
    Ok(this_program()?.children)
}

fn this_program() -> anyhow::Result<Stat> {
    stat("self").context("the kernel doesn't tell this program's processor time")
}

/// Of the database server, with all its processes, those that have ended as well. `None` if it's on another machine.
pub(crate) fn postgres(conn: &mut PgConnection) -> anyhow::Result<Option<Duration>> {
    let backend: i32 = diesel::select(sql::<Integer>("pg_backend_pid()")).get_result(conn)?;
    let of_postgres =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("postgres"));
    let Some(server) = stat(backend).map(|stat| stat.parent).filter(|server| of_postgres(&server.to_string())) else {
        return Ok(None);
    };
    loop {
        let before = stat(server);
        let all = fs::read_dir("/proc").context("there's no /proc")?.flatten();
        let processes = all.filter_map(|entry| stat(entry.file_name().to_str()?));
        let living: Duration = processes.filter(|process| process.parent == server).map(|process| process.own).sum();
        let (Some(before), Some(after)) = (before, stat(server)) else { return Ok(None) };
        // One that ended meanwhile may count twice, or not at all.
        if before.children == after.children {
            return Ok(Some(living + after.own + after.children));
        }
    }
}
