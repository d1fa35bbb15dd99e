//! What stands for a business: work that takes its time, and failures on demand.

use anyhow::anyhow;
use domain::Failure;
use serde::{Deserialize, Deserializer, de};
use std::{process, str::FromStr, thread, time::Duration};

/// How long work takes: always as long, or evenly distributed over a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkTime {
    min_ms: u64,
    max_ms: u64,
}

impl WorkTime {
    /// How long this time.
    pub fn pick(self) -> Duration {
        Duration::from_millis(rand::random_range(self.min_ms..=self.max_ms))
    }
}

impl FromStr for WorkTime {
    type Err = String;

    /// `1000`, or `200..1500`, both ends included.
    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.trim().parse::<u64>().ok();
        match (number(min), number(max)) {
            (Some(min_ms), Some(max_ms)) if min_ms <= max_ms => Ok(Self { min_ms, max_ms }),
            _ => Err(format!("must be milliseconds such as 1000, or a range such as 200..1500, and not {text:?}")),
        }
    }
}

impl<'de> Deserialize<'de> for WorkTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A failure that a payload asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Simulation {
    /// One that may pass.
    Error,
    /// One that won't.
    Permanent,
    /// A panic.
    Panic,
    /// The end of the process, without a word.
    Kill,
    /// No end.
    Hang,
}

impl Simulation {
    /// What the payload asks for by `{"simulate": …}`.
    pub fn asked_for(payload: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Asking {
            simulate: Simulation,
        }
        serde_json::from_str(payload).ok().map(|asking: Asking| asking.simulate)
    }

    /// Fails in that way.
    ///
    /// # Errors
    /// Those asked for.
    ///
    /// # Panics
    /// When that is asked for.
    pub fn run(self) -> Result<(), Failure> {
        match self {
            Self::Error => Err(Failure::Transient(anyhow!("its payload asks for an error"))),
            Self::Permanent => Err(Failure::permanent("its payload asks for a permanent error")),
            Self::Panic => panic!("the event's payload asks for a panic"),
            Self::Kill => process::abort(),
            Self::Hang => loop {
                thread::park();
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_times_are_a_number_or_a_range() {
        assert_eq!("1000".parse(), Ok(WorkTime { min_ms: 1000, max_ms: 1000 }));
        assert_eq!("200..1500".parse(), Ok(WorkTime { min_ms: 200, max_ms: 1500 }));
        for text in ["", "x", "5..", "..5", "9..8", "-1", "1.5", "1...5"] {
            assert!(text.parse::<WorkTime>().is_err(), "{text}");
        }
        let range: WorkTime = "5..7".parse().unwrap();
        assert!((0..100).all(|_| (5..=7).contains(&range.pick().as_millis())));
    }

    #[test]
    fn only_a_payload_that_asks_for_it_fails() {
        assert_eq!(Simulation::asked_for(r#"{"simulate":"kill","n":1}"#), Some(Simulation::Kill));
        for payload in ["1", "{}", r#"{"simulate":"nothing"}"#, r#"["simulate"]"#, "null"] {
            assert_eq!(Simulation::asked_for(payload), None, "{payload}");
        }
    }
}
