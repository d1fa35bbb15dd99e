//! Taking messages in.

use crate::{Handler, engine::Engine};
use domain::{
    Failure,
    stream::{StreamEvent as _, StreamKey},
};
use std::{collections::BTreeMap, sync::Arc};
use storage::streams;
use worker::{BatchHandler, Item, Outgoing, Received, Step};

/// Takes messages in: each says that its key has an event, and has done its work when the key has a lane, or needs none.
pub(crate) struct Intake<H: Handler> {
    pub(crate) engine: Arc<Engine<H::Done>>,
}

impl<H: Handler> BatchHandler for Intake<H> {
    type Message = <H::Key as StreamKey>::Event;

    fn decode(&self, received: &Received) -> anyhow::Result<Self::Message> {
        worker::kind(received, &[self.engine.stream])?;
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<Self::Message>], _: &mut Outgoing, _: &Step) -> Result<(), Failure> {
        let Engine { database, stream, .. } = &*self.engine;
        let mut newest = BTreeMap::<&str, i64>::new();
        let mut positive = true;
        for Item { message, .. } in batch {
            positive &= message.seq() > 0;
            let newest = newest.entry(message.key().as_str()).or_default();
            *newest = message.seq().max(*newest);
        }
        let mut heads: BTreeMap<String, i64> =
            self.engine.wake(newest.keys().copied())?.into_iter().map(|woken| (woken.key, woken.head)).collect();
        let others: Vec<&str> = newest.keys().copied().filter(|key| !heads.contains_key(*key)).collect();
        if !others.is_empty() {
            heads.extend(streams::heads(&mut *database.connection()?, stream, &others)?);
        }
        let committed = newest.iter().all(|(key, seq)| heads.get(*key).is_some_and(|head| seq <= head));
        if committed && positive {
            Ok(())
        } else {
            Err(Failure::permanent("no such event is committed; events are accepted over HTTP alone"))
        }
    }
}
