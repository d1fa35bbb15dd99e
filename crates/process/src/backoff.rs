use std::time::{Duration, Instant};

/// How often an outage that goes on is spoken of.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// Waits that double during an outage, and when to speak of it.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
    since: Option<Instant>,
    said: Option<Instant>,
}

impl Backoff {
    /// Waits from `first` up to `max`.
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, next: first, since: None, said: None }
    }

    /// How long to wait now, and whether it's time to say so: at the beginning of an outage and every 30 s.
    pub fn failed(&mut self) -> (Duration, bool) {
        let now = Instant::now();
        self.since.get_or_insert(now);
        let say = self.said.is_none_or(|said| now - said >= SAY_EVERY);
        if say {
            self.said = Some(now);
        }
        let delay = self.next;
        self.next = (delay * 2).min(self.max);
        (delay, say)
    }

    /// Ends the outage; says how long it lasted, if there was one.
    pub fn reset(&mut self) -> Option<Duration> {
        let lasted = self.since.take()?.elapsed();
        *self = Self::new(self.first, self.max);
        Some(lasted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit_and_begin_anew_after_the_outage() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(200), ms(500));
        assert_eq!(backoff.reset(), None);
        let steps: Vec<_> = (0..4).map(|_| backoff.failed()).collect();
        assert_eq!(steps, [(ms(200), true), (ms(400), false), (ms(500), false), (ms(500), false)]);
        assert!(backoff.reset().is_some());
        assert_eq!(backoff.reset(), None);
        assert_eq!(backoff.failed(), (ms(200), true));
    }
}
