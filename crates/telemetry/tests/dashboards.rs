//! The dashboards under `deploy/grafana` query what exists, and show all of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use domain::topology::queue;
use serde_json::Value;
use telemetry::metrics::{self, Kind, Metric};

const STATSD: &str = include_str!("../../../deploy/monitoring/statsd.js");
const DATA_SOURCE: &str = include_str!("../../../deploy/grafana/provisioning/datasources/graphite.yaml");

/// The dashboards by file name.
fn dashboards() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/grafana/dashboards");
    let mut dashboards: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let json = fs::read_to_string(&path).unwrap();
            (name, serde_json::from_str(&json).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        })
        .collect();
    dashboards.sort_by(|a, b| a.0.cmp(&b.0));
    dashboards
}

fn items<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no text in `{key}` of {value}"))
}

/// The paths in a Graphite expression such as `alias(sumSeries(a.*.b, a.{c,d}.e), 'f')`: what is left without the functions,
/// the strings and the numbers.
fn paths(expression: &str) -> Vec<&str> {
    let (mut paths, mut start, mut braces, mut quote) = (Vec::new(), 0, 0, None);
    for (at, character) in expression.char_indices() {
        let separates = match (quote, character) {
            (Some(begin), _) => {
                if character == begin {
                    quote = None;
                }
                true
            }
            (None, '\'' | '"') => {
                quote = Some(character);
                true
            }
            (None, '{') => {
                braces += 1;
                false
            }
            (None, '}') => {
                braces -= 1;
                false
            }
            (None, ',') => braces == 0,
            // What is before it is a function's name.
            (None, '(') => {
                start = at;
                true
            }
            (None, _) => character == ')' || character.is_whitespace(),
        };
        if separates {
            paths.push(&expression[start..at]);
            start = at + character.len_utf8();
        }
    }
    paths.push(&expression[start..]);
    paths.retain(|path| !path.is_empty() && path.parse::<f64>().is_err());
    paths
}

/// `a.{b,c}` as `a.b` and `a.c`.
fn alternatives(path: &str) -> Vec<String> {
    let Some((before, (inside, after))) =
        path.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)))
    else {
        return vec![path.to_owned()];
    };
    inside.split(',').flat_map(|part| alternatives(&format!("{before}{part}{after}"))).collect()
}

/// The items of a list in StatsD's settings.
fn setting(name: &str) -> impl Iterator<Item = &'static str> {
    let list = STATSD.split_once(&format!("{name}: [")).unwrap().1.split_once(']').unwrap().0;
    list.split(',').map(|item| item.trim().trim_matches('"'))
}

/// What StatsD derives from a metric of the kind, with the settings that it is given.
fn statistics(kind: Kind) -> Vec<String> {
    match kind {
        Kind::Counter => ["rate", "count"].map(str::to_owned).into(),
        Kind::Timer | Kind::Histogram => setting("calculatedTimerMetrics")
            .flat_map(|kept| match kept.strip_suffix("_percent") {
                Some(kept) => setting("percentThreshold").map(|percent| format!("{kept}_{percent}")).collect(),
                None => vec![kept.to_owned()],
            })
            .collect(),
    }
}

/// Whether the part of a queue's metric stands for a queue that there is.
fn is_a_queue(pattern: &str) -> bool {
    let mut queues = queue::update_feed();
    queues.extend(
        [
            queue::ADD_FOLLOWERS,
            queue::PUBLISH_TWEET,
            queue::SEND_NOTIFICATION_EMAIL,
            queue::SEND_NOTIFICATION_SMS,
            queue::DEAD_LETTER,
        ]
        .map(str::to_owned),
    );
    queues.iter().map(|name| name.replace('.', "_")).any(|name| match pattern.split_once('*') {
        Some((before, after)) => name.starts_with(before) && name.ends_with(after),
        None => name == pattern,
    })
}

/// The metric that a path without braces asks for.
fn metric(path: &str) -> Result<&'static Metric, String> {
    let (folder, rest) = path
        .strip_prefix("stats.")
        .and_then(|rest| rest.split_once(".murmuration."))
        .ok_or("it isn't stats.<kind>.murmuration.<metric>.<statistic>")?;
    let (name, statistic) = rest.rsplit_once('.').ok_or("it has no statistic")?;
    let metric = metrics::ALL
        .iter()
        .find(|metric| metric.matches(&name.replace('*', "0")))
        .ok_or_else(|| format!("there is no metric {name}"))?;
    let expected = if metric.kind == Kind::Counter { "counters" } else { "timers" };
    if folder != expected {
        return Err(format!("{name} is under stats.{expected}"));
    }
    if !statistics(metric.kind).iter().any(|derived| derived == statistic) {
        return Err(format!("StatsD makes no {statistic} of {name}"));
    }
    match name.strip_prefix("queue.").and_then(|name| name.split_once('.')) {
        Some((part, _)) if !is_a_queue(part) => Err(format!("there is no queue {part}")),
        _ => Ok(metric),
    }
}

#[test]
fn the_dashboards_query_every_documented_metric_and_no_other() {
    let mut shown = BTreeSet::new();
    for (file, dashboard) in dashboards() {
        let variables = items(&dashboard["templating"], "list");
        let mut queried = Vec::new();
        for panel in items(&dashboard, "panels") {
            let title = text(panel, "title");
            for target in items(panel, "targets") {
                let found = paths(text(target, "target"));
                assert!(!found.is_empty(), "{file}, {title}: nothing is queried by {target}");
                for path in found {
                    let name = |path: &str, variable| path.replace(&format!("${}", text(variable, "name")), "*");
                    let generic = variables.iter().fold(path.to_owned(), |path, variable| name(&path, variable));
                    for path in alternatives(&generic) {
                        let metric = metric(&path).unwrap_or_else(|why| panic!("{file}, {title}: {path}: {why}"));
                        shown.insert(metric.name);
                    }
                    queried.push(path);
                }
            }
        }
        for variable in variables {
            let values = text(variable, "query").replace('*', &format!("${}", text(variable, "name")));
            assert!(
                queried.iter().any(|path| path.starts_with(&format!("{values}."))),
                "{file}: the values of a variable are looked for where no panel uses them: {variable}"
            );
        }
    }
    let documented: BTreeSet<_> = metrics::ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(shown, documented);
}

#[test]
fn the_dashboards_use_the_provisioned_data_source_and_statsd_writes_where_they_look() {
    for (file, dashboard) in dashboards() {
        for user in items(&dashboard, "panels").iter().chain(items(&dashboard["templating"], "list")) {
            let source = format!("uid: {}\n", text(&user["datasource"], "uid"));
            assert!(DATA_SOURCE.contains(&source), "{file}: {user}");
        }
    }
    // Otherwise counters are written to stats.<name> and stats_counts.<name>.
    assert!(STATSD.contains("legacyNamespace: false"));
}

#[test]
fn a_wrong_query_is_found() {
    assert_eq!(paths("alias(sumSeries(a.*.b,a.{c,d}.e), 'f.g (h)') 0.5 i(\"j\", x.y)"), ["a.*.b", "a.{c,d}.e", "x.y"]);
    assert_eq!(alternatives("a.{b,c}.{d,e}"), ["a.b.d", "a.b.e", "a.c.d", "a.c.e"]);
    for (path, why) in [
        ("stats.counters.murmuration.queue.*.receved.rate", "there is no metric queue.*.receved"),
        ("stats.counters.murmuration.*.received.rate", "there is no metric *.received"),
        ("stats.timers.murmuration.queue.*.received.mean", "queue.*.received is under stats.counters"),
        ("stats.timers.murmuration.http.duration_ms.upper_90", "StatsD makes no upper_90 of http.duration_ms"),
        ("stats.timers.murmuration.http.duration_ms.median", "StatsD makes no median of http.duration_ms"),
        ("stats.counters.murmuration.queue.update_fed_*.handled.rate", "there is no queue update_fed_*"),
        ("stats.counters.murmuration.queue.$queue.handled.rate", "there is no metric queue.$queue.handled"),
        ("stats_counts.murmuration.sweep.removed", "it isn't stats.<kind>.murmuration.<metric>.<statistic>"),
    ] {
        assert_eq!(metric(path).unwrap_err(), why);
    }
}
