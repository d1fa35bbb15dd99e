// StatsD's settings, mounted over the image's own.
{
  port: 8125,
  servers: [{ server: "./servers/udp", address: "0.0.0.0", port: 8125 }],
  graphiteHost: "127.0.0.1",
  graphitePort: 2003,
  // The finest resolution of Graphite's storage in this image.
  flushInterval: 10000,
  // stats.timers.<name>.upper_50, upper_95 and upper_99.
  percentThreshold: [50, 95, 99],
  // stats.counters.<name>.rate and .count, beside stats.timers, instead of two trees for counters alone.
  graphite: { legacyNamespace: false }
}
