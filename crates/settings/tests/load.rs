//! The rules by which settings are put together, each through the public functions.

use std::ffi::OsString;
use std::fmt::Debug;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;

use serde::Deserialize;
use settings::{Error, Origin, Problem, Secret};
use tempfile::TempDir;

/// Some sections as the services would have them.
#[derive(Debug, Deserialize)]
struct Service {
    outbox_relay: OutboxRelay,
    health: Health,
    worker: Worker,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutboxRelay {
    batch: i64,
    idle_min_ms: u64,
    idle_max_ms: u64,
}

#[derive(Debug, Deserialize)]
struct Health {
    address: String,
    port: u16,
}

#[derive(Debug, Deserialize)]
struct Worker {
    retry_delays_ms: Vec<u32>,
}

#[derive(Debug, Deserialize)]
struct WithDatabase {
    database: Database,
}

#[derive(Debug, Deserialize)]
struct Database {
    url: Secret,
}

/// A folder of settings, and the variables of the process that reads them.
struct Fixture {
    folder: TempDir,
    variables: Vec<(OsString, OsString)>,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let variables = vec![("MURMURATION_CONFIG_DIR".into(), folder.path().into())];
        Self { folder, variables }
    }

    fn file(self, name: &str, text: &str) -> Self {
        fs::write(self.folder.path().join(name), text).unwrap();
        self
    }

    fn variable(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn load<T: serde::de::DeserializeOwned>(&self) -> Result<T, Error> {
        settings::load_from("test-service", self.variables.clone())
    }

    fn service(&self) -> Service {
        self.load().unwrap()
    }

    /// The error's text, which must not show what every secret of these tests contains.
    fn refused<T: serde::de::DeserializeOwned + Debug>(&self) -> String {
        let error = self.load::<T>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("pa55"), "{error:?}");
        let text = error.to_string();
        text.strip_prefix("settings of test-service: ").unwrap().to_owned()
    }
}

#[test]
fn the_defaults_are_enough_for_sections_without_required_keys() {
    let service = Fixture::new().service();
    assert_eq!(service.outbox_relay.batch, 1000);
    assert_eq!((service.outbox_relay.idle_min_ms, service.outbox_relay.idle_max_ms), (2, 10));
    assert_eq!((service.health.address.as_str(), service.health.port), ("127.0.0.1", 0));
    assert_eq!(service.worker.retry_delays_ms, [1_000, 10_000, 60_000, 600_000]);
}

#[test]
fn a_file_goes_before_the_defaults_and_a_variable_before_the_file() {
    let fixture = Fixture::new()
        .file("local.toml", "[outbox_relay]\nbatch = 7\nidle_min_ms = 8\n[feed_updater]\nbatch = 1\n")
        .variable("MURMURATION__OUTBOX_RELAY__BATCH", "9");
    let relay = fixture.service().outbox_relay;
    assert_eq!((relay.batch, relay.idle_min_ms, relay.idle_max_ms), (9, 8, 10));
}

#[test]
fn a_named_environment_has_its_own_file() {
    let fixture = Fixture::new()
        .file("local.toml", "outbox_relay.batch = 7")
        .file("production.toml", "outbox_relay.batch = 8")
        .variable("MURMURATION_ENVIRONMENT", "production");
    assert_eq!(fixture.service().outbox_relay.batch, 8);
}

#[test]
fn a_named_environment_without_a_file_is_an_error_and_an_empty_name_is_none() {
    assert_eq!(Fixture::new().variable("MURMURATION_ENVIRONMENT", "").service().outbox_relay.batch, 1000);
    for name in ["production", "local"] {
        let fixture = Fixture::new().variable("MURMURATION_ENVIRONMENT", name);
        let expected = format!("can't read {}: ", fixture.path(&format!("{name}.toml")));
        assert!(fixture.refused::<Service>().starts_with(&expected));
    }
}

#[test]
fn a_file_that_is_there_and_cannot_be_read_is_an_error() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.folder.path().join("local.toml")).unwrap();
    assert!(fixture.refused::<Service>().starts_with("can't read "));
}

#[test]
fn a_file_that_is_not_toml_is_an_error_that_tells_the_line_without_quoting_it() {
    for text in ["[broker]\n\nurl = amqp://me:pa55@host\n", "[broker]\n\nurl = \"pa55\n"] {
        let fixture = Fixture::new().file("local.toml", text);
        let refused = fixture.refused::<Service>();
        assert!(refused.starts_with(&format!("{}:3: ", fixture.path("local.toml"))), "{refused}");
    }
}

#[test]
fn an_unknown_key_is_an_error_that_names_it_its_origin_and_the_nearest_known_one() {
    let file = |text| Fixture::new().file("local.toml", text);
    let variable = |name: &str| Fixture::new().variable(name, "1");
    for (fixture, key, nearest) in [
        (file("[outbox_relay]\nbatchs = 1"), "outbox_relay.batchs", "outbox_relay.batch"),
        (file("[databse]\nurl = 'pa55'"), "databse.url", "database.url"),
        (file("pool_size = 1"), "pool_size", "database.pool_size"),
        (file("broker = 'pa55'"), "broker", "broker.url"),
        (file("broker.url.host = 'pa55'"), "broker.url.host", "broker.url"),
        // A section that this service doesn't read.
        (file("[sms_notifier]\nlinger = 1"), "sms_notifier.linger", "sms_notifier.linger_ms"),
        (variable("MURMURATION__OUTBOX_RELAY__BATCHS"), "outbox_relay.batchs", "outbox_relay.batch"),
        (variable("MURMURATION__HEALTH_PORT"), "health_port", "health.port"),
    ] {
        let problem = fixture.load::<Service>().unwrap_err().problem;
        let Problem::UnknownKey { key: found, origin, nearest: proposed } = &problem else { panic!("{problem}") };
        assert_eq!((found.as_str(), proposed.as_str()), (key, nearest), "{problem}");
        let expected = match fixture.variables.get(1) {
            Some((name, _)) => Origin::Variable(name.to_str().unwrap().to_owned()),
            None => Origin::File(fixture.folder.path().join("local.toml")),
        };
        assert_eq!(*origin, expected);
        assert_eq!(
            fixture.refused::<Service>(),
            format!("unknown key `{key}` in {origin}; did you mean `{proposed}`?")
        );
    }
}

#[test]
fn variables_that_only_look_alike_are_none_of_ours() {
    let fixture = Fixture::new()
        .variable("MURMURATION_SERVICE_HOST", "10.0.0.1") // Kubernetes sets such ones
        .variable("PATH", "/bin")
        .variable("OTHER", OsString::from_vec(vec![0xff]));
    assert_eq!(fixture.service().outbox_relay.batch, 1000);
}

#[test]
fn a_value_of_another_type_is_an_error_that_names_the_key_and_the_type() {
    let fixture = Fixture::new().file("local.toml", "[outbox_relay]\nbatch = '7'");
    let origin = fixture.path("local.toml");
    assert_eq!(fixture.refused::<Service>(), format!("`outbox_relay.batch` in {origin} must be of type integer"));

    let fixture = Fixture::new().file("local.toml", "[worker]\nretry_delays_ms = [1, 'pa55']");
    let origin = fixture.path("local.toml");
    assert_eq!(
        fixture.refused::<Service>(),
        format!("`worker.retry_delays_ms` in {origin} must be a list of integers")
    );

    for text in ["", "seven", "7.5", "7\n[broker]\nurl = 'x'", "[7]", "pa55"] {
        assert_eq!(
            Fixture::new().variable("MURMURATION__OUTBOX_RELAY__BATCH", text).refused::<Service>(),
            "`outbox_relay.batch` in the environment variable MURMURATION__OUTBOX_RELAY__BATCH must be of type integer"
        );
    }
}

#[test]
fn a_number_out_of_range_is_an_error_that_names_the_key_and_its_origin() {
    for text in ["70000", "-1"] {
        let refused = Fixture::new().variable("MURMURATION__HEALTH__PORT", text).refused::<Service>();
        let expected = "`health.port` in the environment variable MURMURATION__HEALTH__PORT: must be an unsigned ";
        assert!(refused.starts_with(expected), "{refused}");
    }
    let fixture = Fixture::new().file("local.toml", "worker.retry_delays_ms = [1, 5000000000]");
    let expected = format!("`worker.retry_delays_ms[1]` in {}: must be ", fixture.path("local.toml"));
    assert!(fixture.refused::<Service>().starts_with(&expected));
}

#[test]
fn a_number_out_of_range_in_a_flattened_struct_is_one_of_those_that_were_set_in_its_section() {
    #[derive(Debug, Deserialize)]
    struct Updater {
        #[expect(dead_code)]
        feed_updater: Section,
    }
    #[derive(Debug, Deserialize)]
    struct Section {
        #[expect(dead_code)]
        #[serde(flatten)]
        consuming: Consuming,
    }
    #[derive(Debug, Deserialize)]
    struct Consuming {
        #[expect(dead_code)]
        prefetch: u16,
    }
    let fixture = Fixture::new()
        .file("local.toml", "[feed_updater]\nbatch = 2\n[feed_fanout]\nbatch = 3")
        .variable("MURMURATION__FEED_UPDATER__PREFETCH", "70000");
    assert_eq!(
        fixture.refused::<Updater>(),
        format!(
            "`feed_updater.batch` in {} or `feed_updater.prefetch` in the environment variable \
             MURMURATION__FEED_UPDATER__PREFETCH: invalid value: integer `70000`, expected u16",
            fixture.path("local.toml")
        )
    );
}

#[test]
fn a_variable_holds_a_list_with_or_without_brackets() {
    for (text, delays) in
        [("1,2", &[1, 2][..]), (" 10 , 20 ", &[10, 20]), ("[1, 2,]", &[1, 2]), ("5", &[5]), ("", &[]), ("[]", &[])]
    {
        let fixture = Fixture::new().variable("MURMURATION__WORKER__RETRY_DELAYS_MS", text);
        assert_eq!(fixture.service().worker.retry_delays_ms, delays, "{text:?}");
    }
    for text in ["1;2", "1 2", "1,x", "[1", "1]", "1.5"] {
        let fixture = Fixture::new().variable("MURMURATION__WORKER__RETRY_DELAYS_MS", text);
        assert!(fixture.refused::<Service>().ends_with(" must be a list of integers"), "{text:?}");
    }
}

#[test]
fn a_variable_holds_texts_between_commas() {
    #[derive(Debug, Deserialize)]
    struct Gateway {
        api_gateway: Lists,
    }
    #[derive(Debug, Deserialize)]
    struct Lists {
        hosts: Vec<String>,
        unlimited_addresses: Vec<String>,
    }
    for (text, expected) in [
        ("gateway", &["gateway"][..]),
        (" a.example , 10.0.0.0/8 ", &["a.example", "10.0.0.0/8"]),
        (r#"["a", "b"]"#, &["a", "b"]),
        (r#""a", "b""#, &["a", "b"]),
        ("", &[]),
        ("[]", &[]),
    ] {
        let fixture = Fixture::new()
            .variable("MURMURATION__API_GATEWAY__HOSTS", text)
            .variable("MURMURATION__API_GATEWAY__UNLIMITED_ADDRESSES", text);
        let lists = fixture.load::<Gateway>().unwrap().api_gateway;
        assert_eq!(lists.hosts, expected, "{text:?}");
        assert_eq!(lists.unlimited_addresses, expected, "{text:?}");
    }
}

#[test]
fn a_list_of_a_file_replaces_the_default_one_whole() {
    let fixture = Fixture::new().file("local.toml", "worker.retry_delays_ms = [3]");
    assert_eq!(fixture.service().worker.retry_delays_ms, [3]);
}

#[test]
fn text_in_a_variable_is_taken_as_it_is() {
    for text in ["0.0.0.0", "1", "true", "\"quoted\"", "a=b # c", "[x]"] {
        let fixture = Fixture::new().variable("MURMURATION__HEALTH__ADDRESS", text);
        assert_eq!(fixture.service().health.address, text);
    }
}

#[test]
fn a_required_key_without_a_value_is_an_error_that_says_how_to_set_it() {
    let fixture = Fixture::new();
    assert_eq!(
        fixture.refused::<WithDatabase>(),
        format!(
            "`database.url` isn't set; set the environment variable MURMURATION__DATABASE__URL, or the key in {}",
            fixture.path("local.toml")
        )
    );
    let fixture = fixture.variable("MURMURATION__DATABASE__URL", "");
    assert_eq!(
        fixture.refused::<WithDatabase>(),
        "`database.url` in the environment variable MURMURATION__DATABASE__URL: must not be empty"
    );
}

#[test]
fn a_secret_is_there_for_who_asks_and_in_no_print_of_the_settings() {
    let url = "postgres://me:pa55@host/name";
    let settings: WithDatabase = Fixture::new().variable("MURMURATION__DATABASE__URL", url).load().unwrap();
    assert_eq!(settings.database.url.expose(), url);
    assert_eq!(settings.database.url.to_string(), "(secret)");
    assert_eq!(format!("{settings:?}"), "WithDatabase { database: Database { url: (secret) } }");
}

#[test]
fn a_variable_of_ours_that_is_not_utf8_is_an_error() {
    let fixture = Fixture::new().variable("MURMURATION__DATABASE__URL", OsString::from_vec(b"pa55\xff".to_vec()));
    assert_eq!(fixture.refused::<WithDatabase>(), "the environment variable MURMURATION__DATABASE__URL isn't UTF-8");
}

#[test]
fn a_struct_that_has_not_the_keys_of_its_section_is_found_out_by_its_first_load() {
    #[derive(Debug, Deserialize)]
    struct TooFew {
        #[expect(dead_code)]
        health: OnlyAddress,
    }
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct OnlyAddress {
        #[expect(dead_code)]
        address: String,
    }
    let refused = Fixture::new().refused::<TooFew>();
    assert!(refused.starts_with("`health") && refused.contains("unknown field `port`"), "{refused}");

    #[derive(Debug, Deserialize)]
    struct TooMany {
        #[expect(dead_code)]
        health: WithColour,
    }
    #[derive(Debug, Deserialize)]
    struct WithColour {
        #[expect(dead_code)]
        colour: String,
    }
    let refused = Fixture::new().refused::<TooMany>();
    assert_eq!(refused, "`health.colour` in the built-in default.toml: no such setting in default.toml");
}

#[test]
fn every_key_of_the_defaults_has_a_comment() {
    let text = include_str!("../../../config/default.toml");
    let lines: Vec<_> = text.lines().collect();
    let keys = lines.iter().enumerate().filter(|(_, line)| line.contains(" = ") && !line.starts_with('#'));
    let uncommented: Vec<_> = keys.filter(|(n, _)| !lines[n - 1].starts_with("# ")).collect();
    assert!(uncommented.is_empty(), "{uncommented:?}");
}
