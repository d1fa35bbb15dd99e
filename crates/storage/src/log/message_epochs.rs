//! Table `message_epoch`: what the relays' processes prove their messages with.

use crate::{
    Result,
    schema::{message_epoch, message_partition},
};
use diesel::{PgConnection, prelude::*};
use domain::log::proof::Epoch;
use std::collections::BTreeSet;

/// Registers an epoch, which is to be committed before anything is published in it. One that is registered stays as it is.
pub fn register(conn: &mut PgConnection, epoch: &Epoch) -> Result<()> {
    let row = (message_epoch::epoch.eq(epoch.name()), message_epoch::key.eq(epoch.key()));
    diesel::insert_into(message_epoch::table).values(row).on_conflict_do_nothing().execute(conn)?;
    // Of relays that made no proof there's none from now on.
    diesel::update(message_partition::table.filter(message_partition::unproven_upto.is_null()))
        .set(message_partition::unproven_upto.eq(message_partition::seq.nullable()))
        .execute(conn)?;
    Ok(())
}

/// Those of these epochs that are registered.
pub fn find(conn: &mut PgConnection, names: &BTreeSet<&str>) -> Result<Vec<Epoch>> {
    let rows: Vec<(String, Vec<u8>)> = message_epoch::table
        .filter(message_epoch::epoch.eq_any(names))
        .select((message_epoch::epoch, message_epoch::key))
        .load(conn)?;
    Ok(rows.into_iter().filter_map(|(name, key)| Epoch::registered(name, &key)).collect())
}
