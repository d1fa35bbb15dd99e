#![doc = include_str!("../README.md")]

mod secret;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, ValueKind};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

pub use secret::Secret;

const DEFAULTS: &str = include_str!("../../../config/default.toml");
const PREFIX: &str = "MURMURATION__";
const CONFIG_DIR: &str = "MURMURATION_CONFIG_DIR";
const ENVIRONMENT: &str = "MURMURATION_ENVIRONMENT";

/// Loads the settings of a service from the defaults, the environment's file and the process's variables.
pub fn load<T: DeserializeOwned>(service: &str) -> Result<T, Error> {
    load_from(service, std::env::vars_os())
}

/// As [`load`], with the given variables instead of the process's. For tests.
pub fn load_from<T: DeserializeOwned>(
    service: &str,
    variables: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
) -> Result<T, Error> {
    Layers::read(variables)
        .and_then(Layers::into_settings)
        .map_err(|problem| Error { service: service.to_owned(), problem })
}

/// Why a service's settings can't be used.
#[derive(Debug, thiserror::Error)]
#[error("settings of {service}: {problem}")]
pub struct Error {
    /// The service.
    pub service: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with the settings. No variant holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file of the environment named by `MURMURATION_ENVIRONMENT`, or its folder, isn't there or can't be read.
    #[error("can't read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        error: io::Error,
    },
    /// The file isn't TOML.
    #[error("{}:{line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// A variable's value isn't UTF-8.
    #[error("the environment variable {0} isn't UTF-8")]
    NotUtf8(String),
    /// There is no such key.
    #[error("unknown key `{key}` in {origin}; did you mean `{nearest}`?")]
    UnknownKey {
        /// The unknown key.
        key: String,
        /// Where it was found.
        origin: Origin,
        /// The key that is most like it.
        nearest: String,
    },
    /// The value is of another type than the default.
    #[error("`{key}` in {origin} must be {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// Where it was set.
        origin: Origin,
        /// The default's type.
        expected: String,
    },
    /// A required key has no value.
    #[error("`{key}` isn't set; set the environment variable {variable}, or the key in {}", path.display())]
    Missing {
        /// The key.
        key: String,
        /// The variable that sets it.
        variable: String,
        /// The file that can set it.
        path: PathBuf,
    },
    /// The values have the right types, and the library that they are for refuses them.
    #[error("{}: {reason}", list(settings))]
    Invalid {
        /// The refused key and where it was set. If only its section is known, all that were set there.
        settings: Vec<(String, Origin)>,
        /// Why it was refused.
        reason: String,
    },
}

fn list(settings: &[(String, Origin)]) -> String {
    settings.iter().map(|(key, origin)| format!("`{key}` in {origin}")).collect::<Vec<_>>().join(" or ")
}

/// Where a value was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The built-in `config/default.toml`.
    Default,
    /// The environment's file.
    File(PathBuf),
    /// A variable.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the built-in default.toml"),
            Self::File(path) => path.display().fmt(f),
            Self::Variable(name) => write!(f, "the environment variable {name}"),
        }
    }
}

/// Every key with the value that counts. The defaults come first, so they decide which keys there are and of what types.
struct Layers {
    values: BTreeMap<String, (Value, Origin)>,
    /// The environment's file, which may be missing.
    path: PathBuf,
}

impl Layers {
    fn read(variables: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>) -> Result<Self, Problem> {
        let variables = murmuration_variables(variables)?;
        let given = |name| variables.get(name).filter(|value| !value.is_empty());
        let environment = given(ENVIRONMENT);
        let path = Path::new(given(CONFIG_DIR).map_or("./config", String::as_str))
            .join(format!("{}.toml", environment.map_or("local", String::as_str)));

        let defaults = parse(DEFAULTS, Path::new("default.toml"))?;
        let values = flatten(defaults).into_iter().map(|(key, value)| (key, (value, Origin::Default))).collect();
        let mut layers = Self { values, path };

        match std::fs::read_to_string(&layers.path) {
            Ok(text) => {
                for (key, value) in flatten(parse(&text, &layers.path)?) {
                    layers.set(key, Some(value), Origin::File(layers.path.clone()))?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && environment.is_none() => {}
            Err(error) => return Err(Problem::Unreadable { path: layers.path, error }),
        }

        for (name, text) in &variables {
            if let Some(key) = name.strip_prefix(PREFIX) {
                let key = key.to_lowercase().replace("__", ".");
                let value = match layers.values.get(&key) {
                    Some((known, _)) => parse_variable(text, known),
                    None => None, // refused by `set`
                };
                layers.set(key, value, Origin::Variable(name.clone()))?;
            }
        }
        Ok(layers)
    }

    /// Sets a known key to a value of the type that it has; `None` is a text that doesn't parse.
    fn set(&mut self, key: String, value: Option<Value>, origin: Origin) -> Result<(), Problem> {
        let Some(current) = self.values.get_mut(&key) else {
            let nearest = self.nearest(&key);
            return Err(Problem::UnknownKey { key, origin, nearest });
        };
        match value {
            Some(value) if same_type(&current.0, &value) => {
                *current = (value, origin);
                Ok(())
            }
            _ => Err(Problem::WrongType { key, origin, expected: type_name(&current.0) }),
        }
    }

    fn nearest(&self, key: &str) -> String {
        let likeness = |known: &&String| (strsim::normalized_damerau_levenshtein(known, key) * 1000.0) as u32;
        self.values.keys().max_by_key(likeness).cloned().unwrap_or_default()
    }

    fn into_settings<T: DeserializeOwned>(self) -> Result<T, Problem> {
        let build = || {
            let mut builder = Config::builder();
            for (key, (value, _)) in &self.values {
                builder = builder.set_override(key, convert(value))?;
            }
            builder.build()?.try_deserialize()
        };
        build().map_err(|error| self.problem(error))
    }

    fn problem(&self, error: ConfigError) -> Problem {
        let (key, reason) = match error {
            // The error's own text would show the value.
            ConfigError::Type { key, expected, .. } => (key.unwrap_or_default(), format!("must be {expected}")),
            ConfigError::At { error, key, .. } => (key.unwrap_or_default(), error.to_string()),
            ConfigError::NotFound(key) => (key, "no such setting in default.toml".to_owned()),
            other => (String::new(), other.to_string()),
        };
        match self.values.get(key.split('[').next().unwrap_or_default()) {
            Some((Value::String(text), Origin::Default)) if text.is_empty() => Problem::Missing {
                variable: format!("{PREFIX}{}", key.to_uppercase().replace('.', "__")),
                path: self.path.clone(),
                key,
            },
            Some((_, origin)) => Problem::Invalid { settings: vec![(key, origin.clone())], reason },
            None => Problem::Invalid { settings: self.set_in(&key), reason },
        }
    }

    /// What was set in a section. A struct that is flattened into its section's loses the name of the refused key.
    fn set_in(&self, section: &str) -> Vec<(String, Origin)> {
        let prefix = format!("{section}.");
        let set =
            self.values.iter().filter(|(key, (_, origin))| key.starts_with(&prefix) && *origin != Origin::Default);
        let set: Vec<_> = set.map(|(key, (_, origin))| (key.clone(), origin.clone())).collect();
        if set.is_empty() { vec![(section.to_owned(), Origin::Default)] } else { set }
    }
}

/// The variables that are ours, by name. Only these have to be UTF-8.
fn murmuration_variables(
    variables: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
) -> Result<BTreeMap<String, String>, Problem> {
    let ours = |name: &String| name.starts_with(PREFIX) || name == CONFIG_DIR || name == ENVIRONMENT;
    variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into().into_string().ok().filter(ours)?, value.into())))
        .map(|(name, value)| match value.into_string() {
            Ok(value) => Ok((name, value)),
            Err(_) => Err(Problem::NotUtf8(name)),
        })
        .collect()
}

/// Parses a file. The parser's own display quotes the offending line, which may hold a secret: take only its message.
fn parse(text: &str, path: &Path) -> Result<Table, Problem> {
    text.parse().map_err(|error: toml::de::Error| Problem::Syntax {
        path: path.to_owned(),
        line: error.span().map_or(1, |span| text[..span.start].lines().count().max(1)),
        reason: error.message().to_owned(),
    })
}

/// Parses a variable's value to the type of the setting: text as it is, also between the commas of a list of texts (as lists
/// that are empty by default are), anything else as in TOML.
fn parse_variable(text: &str, known: &Value) -> Option<Value> {
    let text = text.trim();
    match known {
        Value::String(_) => Some(Value::String(text.to_owned())),
        Value::Array(known) if !text.starts_with('[') => match known.first() {
            Some(Value::String(_)) | None if !text.starts_with('"') => {
                let texts = text.split(',').map(str::trim).filter(|text| !text.is_empty());
                Some(Value::Array(texts.map(|text| Value::String(text.to_owned())).collect()))
            }
            _ => format!("[{text}]").parse().ok(),
        },
        _ => text.parse().ok(),
    }
}

/// A table's values by dotted key.
fn flatten(table: Table) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                flat.extend(flatten(inner).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => {
                flat.insert(key, value);
            }
        }
    }
    flat
}

fn same_type(known: &Value, value: &Value) -> bool {
    match (known, value) {
        (Value::Array(known), Value::Array(values)) => match known.first() {
            Some(known) => values.iter().all(|value| same_type(known, value)),
            None => true,
        },
        _ => known.same_type(value),
    }
}

fn type_name(value: &Value) -> String {
    match value {
        Value::Array(values) => match values.first() {
            Some(first) => format!("a list of {}s", first.type_str()),
            None => "a list".to_owned(),
        },
        value => format!("of type {}", value.type_str()),
    }
}

fn convert(value: &Value) -> ValueKind {
    match value {
        Value::String(text) => text.as_str().into(),
        Value::Integer(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Boolean(truth) => (*truth).into(),
        Value::Datetime(time) => time.to_string().into(),
        Value::Array(values) => values.iter().map(convert).collect::<Vec<_>>().into(),
        // `flatten` leaves tables only inside of lists, and no setting is a list of tables.
        Value::Table(_) => ValueKind::Nil,
    }
}
