use std::collections::BTreeMap;

/// The deliveries of one channel that were handed out and aren't settled, by delivery tag.
///
/// Deliveries are handed out in the order of their tags. So every tag below the lowest unsettled one is settled, and one
/// acknowledgement of "all up to this" covers those; above it each needs its own.
#[derive(Debug)]
pub(crate) struct Unsettled<T> {
    deliveries: BTreeMap<u64, T>,
}

impl<T> Default for Unsettled<T> {
    fn default() -> Self {
        Self { deliveries: BTreeMap::new() }
    }
}

impl<T> Unsettled<T> {
    /// Notes a delivery that is handed out.
    pub(crate) fn insert(&mut self, tag: u64, delivery: T) {
        debug_assert!(self.deliveries.last_key_value().is_none_or(|(&last, _)| last < tag));
        self.deliveries.insert(tag, delivery);
    }

    /// Takes out these deliveries, each by itself.
    pub(crate) fn take(&mut self, tags: impl IntoIterator<Item = u64>) -> Vec<T> {
        tags.into_iter().filter_map(|tag| self.deliveries.remove(&tag)).collect()
    }

    /// Takes out these deliveries, and says what to acknowledge for them.
    pub(crate) fn settle(&mut self, tags: impl IntoIterator<Item = u64>) -> Acks<T> {
        let settled: BTreeMap<u64, T> = tags.into_iter().filter_map(|tag| self.deliveries.remove_entry(&tag)).collect();
        let count = settled.len();
        let mut below = settled;
        let single = match self.deliveries.first_key_value() {
            Some((lowest, _)) => below.split_off(lowest),
            None => BTreeMap::new(),
        };
        Acks {
            count,
            all_up_to: below.pop_last().map(|(_, delivery)| delivery),
            single: single.into_values().collect(),
        }
    }
}

/// Acknowledgements to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Acks<T> {
    /// How many deliveries they settle.
    pub(crate) count: usize,
    /// This delivery and all before it.
    pub(crate) all_up_to: Option<T>,
    /// These, each by itself.
    pub(crate) single: Vec<T>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};
    use std::collections::BTreeSet;

    fn unsettled(tags: impl IntoIterator<Item = u64>) -> Unsettled<u64> {
        let mut unsettled = Unsettled::default();
        tags.into_iter().for_each(|tag| unsettled.insert(tag, tag));
        unsettled
    }

    #[test]
    fn only_what_lies_below_the_lowest_unsettled_tag_is_acknowledged_together() {
        let mut unsettled = unsettled(1..=9);
        assert_eq!(unsettled.settle([5, 2, 1]), Acks { count: 3, all_up_to: Some(2), single: vec![5] });
        assert_eq!(unsettled.settle([4]), Acks { count: 1, all_up_to: None, single: vec![4] });
        assert_eq!(unsettled.settle([3, 8]), Acks { count: 2, all_up_to: Some(3), single: vec![8] });
        assert_eq!(unsettled.settle([9, 7, 6]), Acks { count: 3, all_up_to: Some(9), single: vec![] });
    }

    #[test]
    fn a_tag_is_settled_once() {
        let mut unsettled = unsettled(1..=2);
        assert_eq!(unsettled.settle([1, 1]).count, 1);
        assert_eq!(unsettled.settle([1, 7]), Acks { count: 0, all_up_to: None, single: vec![] });
    }

    /// Against a broker that is played by a set of unacknowledged tags, and closes the channel over an unknown one.
    #[test]
    fn the_broker_never_sees_a_tag_acknowledged_early_or_twice() {
        let mut random = SmallRng::seed_from_u64(2);
        for _ in 0..300 {
            let mut unsettled = Unsettled::default();
            let mut at_broker = BTreeSet::new();
            let mut in_hand = Vec::new();
            // Delivered to the client, and handed out by it.
            let (mut delivered, mut handed_out) = (0, 0);
            for _ in 0..60 {
                for _ in 0..random.random_range(0..6) {
                    delivered += 1;
                    at_broker.insert(delivered);
                }
                for tag in handed_out + 1..=random.random_range(handed_out..=delivered) {
                    handed_out = tag;
                    unsettled.insert(tag, tag);
                    in_hand.push(tag);
                }
                in_hand.shuffle(&mut random);
                let done = in_hand.split_off(random.random_range(0..=in_hand.len()));
                let acks = unsettled.settle(done.iter().copied());
                assert_eq!(acks.count, done.len());
                if let Some(tag) = acks.all_up_to {
                    assert!(at_broker.contains(&tag), "unknown delivery tag {tag}");
                    at_broker = at_broker.split_off(&(tag + 1));
                }
                for tag in acks.single {
                    assert!(at_broker.remove(&tag), "unknown delivery tag {tag}");
                }
                assert_eq!(at_broker, in_hand.iter().copied().chain(handed_out + 1..=delivered).collect());
            }
        }
    }
}
