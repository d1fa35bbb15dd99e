//! What this crate costs: messages per second and processor time through a quorum queue, by the AMQP client alone and by this crate.
//!
//! ```sh
//! AMQP_URL=amqp://… cargo run --release -p broker --example throughput [MESSAGES]
//! ```
#![expect(clippy::print_stdout, reason = "its output is what it's for")]

use std::{
    env, fs, mem,
    time::{Duration, Instant},
};

use amiquip::{AmqpProperties, Confirm, Connection, ConsumerMessage, ConsumerOptions, Publish, QueueDeleteOptions};
use broker::{Consumer, Publisher, Session, Settings};
use domain::{
    Envelope,
    topology::{Expiry, Queue, Topology},
};

const QUEUE: &str = "throughput";
const WINDOW: usize = 1024;
const PREFETCH: u16 = 1000;
const BODY: [u8; 300] = [b'x'; 300];

fn main() {
    let url = env::var("AMQP_URL").expect("AMQP_URL names the broker");
    let count = env::args().nth(1).map_or(100_000, |count| count.parse().expect("a number of messages"));
    let settings = Settings {
        url: url.clone().into(),
        connect_timeout_ms: 3000,
        heartbeat_s: 5,
        confirm_timeout_ms: 10_000,
        window_messages: WINDOW,
        window_bytes: 4 << 20,
    };
    let queue = Queue { name: QUEUE.into(), expiry: Expiry::Never };
    let topology = Topology { queues: vec![queue], ..Topology::default() };
    broker::declare(&mut Session::open(&settings, "throughput").unwrap(), &topology).unwrap();

    for _ in 0..3 {
        measure("publish, client alone", count, || publish_by_client(&url, count));
        measure("consume, client alone", count, || consume_by_client(&url, count));
        measure("publish, this crate", count, || publish(&settings, count));
        measure("consume, this crate", count, || consume(&settings, count));
    }
    let mut connection = Connection::insecure_open(&url).unwrap();
    let channel = connection.open_channel(None).unwrap();
    channel.queue_delete(QUEUE, QueueDeleteOptions::default()).unwrap();
}

fn measure(what: &str, count: usize, work: impl FnOnce()) {
    let (started, cpu) = (Instant::now(), cpu_seconds());
    work();
    let (elapsed, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let count = count as f64;
    println!("{what}: {:.0} messages/s, {:.1} µs of processor time each", count / elapsed, cpu / count * 1e6);
}

/// The processor time of this process so far, on Linux, which counts it in hundredths of a second.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // User and system time are the fields 14 and 15; the name of the process, which may have blanks, ends with a bracket.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn publish(settings: &Settings, count: usize) {
    let envelopes: Vec<_> = (0..count).map(|_| Envelope::new("", QUEUE, BODY.into())).collect();
    let deadline = Instant::now() + Duration::from_secs(600);
    Publisher::new(settings, "throughput").publish_all(&envelopes, deadline).unwrap();
}

fn consume(settings: &Settings, count: usize) {
    let mut consumer = Consumer::new(settings, "throughput", vec![QUEUE.into()], PREFETCH);
    let mut left = count;
    while left > 0 {
        let batch = consumer.next_batch(500, Duration::from_millis(20), Duration::from_secs(1)).unwrap();
        left -= batch.deliveries.len();
        consumer.ack(batch);
    }
    consumer.close(Instant::now() + Duration::from_secs(10));
}

fn publish_by_client(url: &str, count: usize) {
    let mut connection = Connection::insecure_open(url).unwrap();
    let channel = connection.open_channel(None).unwrap();
    channel.enable_publisher_confirms().unwrap();
    let confirms = channel.listen_for_publisher_confirms().unwrap();
    let mut confirmed = 0;
    for sent in 0..count {
        let properties = AmqpProperties::default().with_delivery_mode(2);
        channel.basic_publish("", Publish::with_properties(&BODY, QUEUE, properties)).unwrap();
        while sent + 1 - confirmed >= WINDOW || sent + 1 == count && confirmed < count {
            // Enough for a broker without trouble: quorum queues confirm in order.
            match confirms.recv().unwrap() {
                Confirm::Ack(payload) if payload.multiple => confirmed = payload.delivery_tag as usize,
                Confirm::Ack(_) => confirmed += 1,
                Confirm::Nack(_) => panic!("nacked"),
            }
        }
    }
    channel.close().unwrap();
    connection.close().unwrap();
}

fn consume_by_client(url: &str, count: usize) {
    let mut connection = Connection::insecure_open(url).unwrap();
    let channel = connection.open_channel(None).unwrap();
    channel.qos(0, PREFETCH, false).unwrap();
    let consumer = channel.basic_consume(QUEUE, ConsumerOptions::default()).unwrap();
    for received in 1..=count {
        let ConsumerMessage::Delivery(delivery) = consumer.receiver().recv().unwrap() else { panic!("no delivery") };
        if received.is_multiple_of(500) || received == count {
            delivery.ack_multiple(&channel).unwrap();
        }
    }
    mem::forget(consumer);
    channel.close().unwrap();
    connection.close().unwrap();
}
