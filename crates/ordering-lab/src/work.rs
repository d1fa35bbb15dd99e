//! How long a message's work takes.

use rand::{RngExt as _, rngs::SmallRng};
use std::{fmt, str::FromStr, time::Duration};

/// Milliseconds, evenly distributed over a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkTime {
    min_ms: u64,
    max_ms: u64,
}

impl WorkTime {
    /// How long this time.
    pub(crate) fn pick(self, random: &mut SmallRng) -> Duration {
        Duration::from_millis(random.random_range(self.min_ms..=self.max_ms))
    }

    /// The longest it may take.
    pub(crate) fn longest(self) -> Duration {
        Duration::from_millis(self.max_ms)
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
            _ => Err("must be milliseconds such as 1000, or a range such as 200..1500".into()),
        }
    }
}

impl fmt::Display for WorkTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.min_ms, self.max_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn work_times_are_a_number_or_a_range() {
        assert_eq!("7".parse(), Ok(WorkTime { min_ms: 7, max_ms: 7 }));
        let range: WorkTime = "5..7".parse().unwrap();
        assert_eq!(range.to_string(), "5..7");
        let mut random = SmallRng::seed_from_u64(1);
        assert!((0..100).all(|_| (5..=7).contains(&range.pick(&mut random).as_millis())));
        for text in ["", "x", "5..", "..5", "9..8", "-1", "1.5", "1...5"] {
            assert!(text.parse::<WorkTime>().is_err(), "{text}");
        }
    }
}
