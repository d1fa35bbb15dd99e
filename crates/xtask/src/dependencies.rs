//! What may depend on what, and which crates of others the fleet is made of.

use anyhow::ensure;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::{Command, Stdio},
};

/// A crate and what it must not have below it, directly or by way of others. The allowed direction: services -> worker ->
/// broker -> domain, and services -> storage -> domain.
const MUST_NOT_KNOW: [(&str, &[&str]); 7] = [
    ("domain", &["broker", "storage", "worker"]),
    ("broker", &["storage", "worker"]),
    ("storage", &["broker", "worker"]),
    ("worker", &["storage"]),
    ("leases", &["broker", "worker"]),
    ("api-gateway", &["broker", "worker", "sequenced"]),
    ("process", &["broker", "storage", "worker", "domain"]),
];

/// A crate and the only ones that may depend on it by themselves. Tests always may.
const KNOWN_ONLY_TO: [(&str, &[&str]); 8] = [
    ("amiquip", &["broker"]),
    ("diesel", &["storage", "diesel_migrations", "ordering-lab", "bench", "test-support"]),
    ("diesel_migrations", &["storage"]),
    ("sequenced", &["event-processor", "ordering-lab"]),
    ("leases", &["sequenced", "message-recorder"]),
    ("test-support", &[]),
    ("harness", &["test-support", "ordering-lab", "bench"]),
    ("command-line", &["fleetctl", "ordering-lab", "bench"]),
];

/// Programs that, like services, know no service.
const TOOLS: [&str; 3] = ["fleetctl", "ordering-lab", "bench"];

const LICENCES: [&str; 7] =
    ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Unicode-3.0", "BSD-2-Clause", "BSD-3-Clause", "Zlib"];

/// Crates that are here in more than one version, under whoever keeps the older.
const DOUBLED: [(&str, &[&str]); 4] = [
    // Its last release is of 2021.
    (
        "amiquip",
        &[
            "cfg-if",
            "hashbrown",
            "heck",
            "idna",
            "indexmap",
            "mio",
            "percent-encoding",
            "syn",
            "toml",
            "url",
            "version_check",
        ],
    ),
    ("diesel", &["syn", "toml", "toml_datetime", "winnow"]),
    ("actix-web", &["http", "syn"]),
    ("r2d2", &["lock_api", "parking_lot", "parking_lot_core"]),
];

/// Crates by their ids, with those that each uses in the fleet, and not in its tests.
struct Graph {
    crates: BTreeMap<String, Value>,
    uses: BTreeMap<String, Vec<String>>,
    own: Vec<String>,
}

/// Prints what is wrong, and returns whether nothing is.
pub(crate) fn check() -> anyhow::Result<bool> {
    let graph = Graph::load()?;
    let services = fs::read_to_string("deploy/services")?;
    let services: Vec<_> = services.lines().filter(|line| !line.starts_with('#')).collect();
    let mut wrong = Vec::new();

    let programs: Vec<_> = services.iter().copied().chain(TOOLS).collect();
    let others = |service| programs.iter().copied().filter(|other| *other != service).collect::<Vec<_>>();
    let services_alone: Vec<_> = services.iter().map(|service| (*service, others(*service))).collect();
    let alone = services_alone.iter().map(|(service, others)| (*service, &others[..]));
    for (name, forbidden) in MUST_NOT_KNOW.into_iter().chain(alone) {
        for found in graph.below(&graph.own_named(name)).iter().filter(|id| forbidden.contains(&graph.name(id))) {
            let found = graph.name(found);
            wrong.push(format!("{name} must not depend on {found}: cargo tree -p {name} -e normal,build -i {found}"));
        }
    }
    for (name, allowed) in KNOWN_ONLY_TO.into_iter().chain([("service", &services[..])]) {
        for user in graph.users(name).filter(|user| !allowed.contains(user)) {
            wrong.push(format!("{user} must not depend on {name} by itself"));
        }
    }

    for (id, package) in graph.crates.iter().filter(|(id, _)| !graph.own.contains(id)) {
        let licence = package["license"].as_str().unwrap_or("no licence");
        if !allowed(licence) {
            wrong.push(format!("{id}: {licence} is not among the allowed licences"));
        }
        if package["source"] != "registry+https://github.com/rust-lang/crates.io-index" {
            wrong.push(format!("{id} is not from crates.io"));
        }
    }

    let (doubled, expected) = (graph.doubled(), DOUBLED.iter().flat_map(|(_, names)| *names).copied().collect());
    for name in doubled.difference(&expected) {
        wrong.push(format!("{name} is here in two versions: cargo tree --duplicates"));
    }
    for name in expected.difference(&doubled) {
        wrong.push(format!("{name} is here in one version: take it off the list of those that aren't"));
    }
    wrong.iter().for_each(|line| eprintln!("dependencies: {line}"));
    Ok(wrong.is_empty())
}

/// Whether an expression such as `(MIT OR Apache-2.0) AND Unicode-3.0` is met by the licences that are allowed. Where it's
/// nested otherwise, this is stricter than the expression.
fn allowed(expression: &str) -> bool {
    expression.split(" AND ").all(|part| {
        let either = part.trim_matches(['(', ')']).replace('/', " OR ");
        either.split(" OR ").any(|licence| LICENCES.contains(&licence.trim()))
    })
}

impl Graph {
    fn load() -> anyhow::Result<Self> {
        let output = Command::new("cargo")
            .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(output.status.success(), "cargo metadata failed");
        let metadata: Value = serde_json::from_slice(&output.stdout)?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let uses = list(&metadata["resolve"]["nodes"]).into_iter().map(|node| {
            let used = list(&node["deps"]).into_iter();
            let used = used.filter(|dep| list(&dep["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev"));
            (text(&node["id"]), used.map(|dep| text(&dep["pkg"])).collect())
        });
        Ok(Self {
            uses: uses.collect(),
            own: list(&metadata["workspace_members"]).iter().map(text).collect(),
            crates: list(&metadata["packages"]).into_iter().map(|package| (text(&package["id"]), package)).collect(),
        })
    }

    fn name(&self, id: &str) -> &str {
        self.crates[id]["name"].as_str().unwrap_or_default()
    }

    fn own_named(&self, name: &str) -> Vec<String> {
        self.own.iter().filter(|id| self.name(id) == name).cloned().collect()
    }

    /// These crates and all below them.
    fn below(&self, from: &[String]) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut open = from.to_vec();
        while let Some(id) = open.pop() {
            if seen.insert(id.clone()) {
                open.extend(self.uses[&id].iter().cloned());
            }
        }
        seen
    }

    /// Who depends on a crate directly.
    fn users(&self, name: &str) -> impl Iterator<Item = &str> {
        let uses = move |used: &Vec<String>| used.iter().any(|id| self.name(id) == name);
        self.uses.iter().filter(move |(_, used)| uses(used)).map(|(id, _)| self.name(id))
    }

    fn doubled(&self) -> BTreeSet<&str> {
        let mut names: Vec<_> = self.crates.keys().map(|id| self.name(id)).collect();
        names.sort_unstable();
        names.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect()
    }
}
