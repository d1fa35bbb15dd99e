use anyhow::ensure;
use serde::Deserialize;
use std::time::Duration;

/// The section `[sequenced]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long a lease runs without being renewed: a process that dies is missed after that.
    pub lease_ttl_ms: u64,
    /// How often leases are renewed, and free ones looked for.
    pub lease_renew_ms: u64,
    /// How often to look for events that no message has brought.
    pub sweep_ms: u64,
}

impl Settings {
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.lease_renew_ms > 0, "sequenced.lease_renew_ms must be above 0");
        ensure!(
            self.lease_ttl_ms >= 2 * self.lease_renew_ms,
            "sequenced.lease_ttl_ms must be at least twice sequenced.lease_renew_ms"
        );
        ensure!(self.sweep_ms > 0, "sequenced.sweep_ms must be above 0");
        Ok(())
    }

    pub(crate) fn ttl(&self) -> Duration {
        Duration::from_millis(self.lease_ttl_ms)
    }

    pub(crate) fn renew(&self) -> Duration {
        Duration::from_millis(self.lease_renew_ms)
    }

    pub(crate) fn sweep(&self) -> Duration {
        Duration::from_millis(self.sweep_ms)
    }
}
