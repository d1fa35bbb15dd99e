// StatsD's settings, mounted over the image's own.
{
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  // The finest resolution in storage-schemas.conf.
  flushInterval: 10000,
  // What is kept of a timer: each of them is a file.
  percentThreshold: [50, 95, 99],
  calculatedTimerMetrics: ["count_ps", "mean", "upper", "upper_percent"],
  // stats.counters.<name>.rate and .count, beside stats.timers, instead of two trees for counters alone.
  graphite: { legacyNamespace: false }
}
