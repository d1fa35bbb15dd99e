use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Waits between attempts to connect, doubling. Each is shortened at random by up to a half, so that a fleet that lost its
/// broker doesn't come back all at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    pub(crate) fn wait(&mut self) -> Duration {
        let wait = self.next.mul_f64(rand::random_range(0.5..=1.0));
        self.next = (self.next * 2).min(LONGEST);
        wait
    }

    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut backoff = Backoff::new();
        for wanted in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.wait().as_millis();
            assert!((wanted / 2..=wanted).contains(&wait), "{wait} ms, wanted about {wanted}");
        }
        backoff.reset();
        assert!(backoff.wait() <= FIRST);
    }
}
