use std::{collections::BTreeMap, mem};

/// A published message that the broker hasn't confirmed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Which call published it: the confirm of an earlier call's message only makes room in the window.
    pub(crate) call: u64,
    /// Its index in that call.
    pub(crate) index: usize,
    /// The size of its body.
    pub(crate) bytes: usize,
    /// The broker has returned it as unroutable; the confirm is still to come.
    pub(crate) returned: Option<(u16, String)>,
}

/// The unconfirmed messages of one channel by delivery tag, which counts them from 1.
#[derive(Debug, Default)]
pub(crate) struct Unconfirmed {
    sent: BTreeMap<u64, Sent>,
    last_tag: u64,
    bytes: usize,
}

impl Unconfirmed {
    pub(crate) fn len(&self) -> usize {
        self.sent.len()
    }

    /// The bytes of all their bodies.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Waits no longer for the confirms of those that match, which make room; returns them.
    pub(crate) fn give_up(&mut self, matches: impl Fn(&Sent) -> bool) -> Vec<Sent> {
        let (given_up, left): (BTreeMap<_, _>, _) =
            mem::take(&mut self.sent).into_iter().partition(|(_, sent)| matches(sent));
        self.sent = left;
        let given_up: Vec<_> = given_up.into_values().collect();
        self.bytes -= given_up.iter().map(|sent| sent.bytes).sum::<usize>();
        given_up
    }

    /// Notes the next message of the channel.
    pub(crate) fn push(&mut self, sent: Sent) {
        self.last_tag += 1;
        self.bytes += sent.bytes;
        self.sent.insert(self.last_tag, sent);
    }

    /// Takes out what a confirm of `tag` is about: that message, or with `multiple` all up to it.
    pub(crate) fn settle(&mut self, tag: u64, multiple: bool) -> impl Iterator<Item = Sent> + use<> {
        let settled = if multiple {
            let later = self.sent.split_off(&(tag + 1));
            mem::replace(&mut self.sent, later)
        } else {
            self.sent.remove_entry(&tag).into_iter().collect()
        };
        self.bytes -= settled.values().map(|sent| sent.bytes).sum::<usize>();
        settled.into_values()
    }

    /// Notes that the broker has returned the oldest of the messages that match.
    pub(crate) fn return_first(&mut self, code: u16, text: String, matches: impl Fn(&Sent) -> bool) {
        if let Some(sent) = self.sent.values_mut().find(|sent| sent.returned.is_none() && matches(sent)) {
            sent.returned = Some((code, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    fn sent(index: usize, bytes: usize) -> Sent {
        Sent { call: 1, index, bytes, returned: None }
    }

    fn indexes(settled: impl Iterator<Item = Sent>) -> Vec<usize> {
        settled.map(|sent| sent.index).collect()
    }

    #[test]
    fn one_confirm_settles_one_message_and_multiple_all_up_to_it() {
        let mut unconfirmed = Unconfirmed::default();
        (0..6).for_each(|index| unconfirmed.push(sent(index, 10)));
        assert_eq!(indexes(unconfirmed.settle(2, false)), [1]);
        assert_eq!(indexes(unconfirmed.settle(4, true)), [0, 2, 3]);
        assert_eq!(indexes(unconfirmed.settle(4, false)), [] as [usize; 0], "confirmed twice");
        assert_eq!((unconfirmed.len(), unconfirmed.bytes()), (2, 20));
        assert_eq!(indexes(unconfirmed.settle(6, true)), [4, 5]);
        assert_eq!(unconfirmed.len(), 0);
    }

    #[test]
    fn a_returned_message_is_found_once() {
        let mut unconfirmed = Unconfirmed::default();
        (0..3).for_each(|index| unconfirmed.push(sent(index, 1)));
        unconfirmed.return_first(312, "NO_ROUTE".into(), |sent| sent.index > 0);
        unconfirmed.return_first(312, "NO_ROUTE".into(), |sent| sent.index > 0);
        unconfirmed.return_first(312, "NO_ROUTE".into(), |sent| sent.index > 2);
        let returned: Vec<_> =
            unconfirmed.sent.values().filter(|sent| sent.returned.is_some()).map(|sent| sent.index).collect();
        assert_eq!(returned, [1, 2]);
    }

    #[test]
    fn what_is_given_up_makes_room_and_its_late_confirm_means_nothing() {
        let mut unconfirmed = Unconfirmed::default();
        (0..4).for_each(|index| unconfirmed.push(sent(index, 10)));
        let given_up = unconfirmed.give_up(|sent| sent.index % 2 == 1);
        assert_eq!(given_up.iter().map(|sent| sent.index).collect::<Vec<_>>(), [1, 3]);
        assert_eq!((unconfirmed.len(), unconfirmed.bytes()), (2, 20));
        assert_eq!(indexes(unconfirmed.settle(2, false)), [] as [usize; 0]);
        assert_eq!(indexes(unconfirmed.settle(4, true)), [0, 2]);
    }

    #[test]
    fn every_message_is_settled_exactly_once_in_any_order_of_confirms() {
        let mut random = SmallRng::seed_from_u64(1);
        for _ in 0..200 {
            let count = random.random_range(1..60);
            let mut unconfirmed = Unconfirmed::default();
            let mut settled = vec![0; count];
            let mut published = 0;
            while published < count || unconfirmed.len() > 0 {
                if published < count && random.random_bool(0.6) {
                    unconfirmed.push(sent(published, published));
                    published += 1;
                } else if published > 0 {
                    let tag = random.random_range(1..=published as u64);
                    let multiple = random.random_bool(0.5);
                    for sent in unconfirmed.settle(tag, multiple) {
                        assert!(sent.index as u64 + 1 == tag || multiple && sent.index as u64 + 1 < tag);
                        settled[sent.index] += 1;
                    }
                }
                assert_eq!(unconfirmed.bytes(), unconfirmed.sent.values().map(|sent| sent.bytes).sum::<usize>());
            }
            assert!(settled.iter().all(|&times| times == 1), "{settled:?}");
        }
    }
}
