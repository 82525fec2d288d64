//! How the settings become a publisher: the same for the stream, the scans, stragglers and a replay.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{AfterPublish, Config};
use crate::meter::Meter;
use crate::outbox::Role;
use crate::pipe::Routing;
use crate::postgres::Subscription;
use crate::pulsar::{Diversion, Doubts, PublisherConfig};
use crate::scanner::outbox::{SEQ, TXID};
use crate::scanner::straggler::Stragglers;

/// How long a topic may be refused before its events become stragglers: a permission or a namespace that is just being made.
const REFUSED_GRACE: Duration = Duration::from_secs(3);

/// Which tables and columns are read, and where rows go.
pub(crate) fn routing(config: &Config) -> Routing {
    Routing {
        tables: config.outbox_tables.clone(),
        columns: config.columns.clone(),
        template: config.topic.clone(),
        report_rows: config.after_publish != AfterPublish::Keep,
    }
}

/// What must be published for that, and the columns that are read: those of the settings, and what the scanner relies on.
pub(crate) fn subscription(config: &Config) -> Subscription {
    let of_roles = Role::ALL.map(|role| config.columns.name(role));
    let columns = of_roles
        .into_iter()
        .chain(config.topic.columns_used(&config.columns))
        .chain([TXID, SEQ])
        .filter(|name| !name.is_empty());
    Subscription {
        publication: config.publication.clone(),
        tables: config.outbox_tables.clone(),
        columns: columns.map(ToOwned::to_owned).collect(),
    }
}

/// How events of this cluster and timeline are published, under names of this generation ([`crate::scanner::name_mark`]).
pub(crate) fn publisher_config(
    config: &Config,
    meter: &Arc<Meter>,
    system_id: &str,
    timeline: u32,
    generation: u64,
) -> PublisherConfig {
    // As names were before there were generations.
    let generation = match generation {
        0 => String::new(),
        generation => format!("g{generation}"),
    };
    PublisherConfig {
        service: config.pulsar_url.hosts.clone(),
        auth: config.pulsar_auth.clone(),
        tls: config.broker_tls(),
        keepalive_interval: config.pulsar_keepalive_interval,
        // A failover or a restored copy may hand out the same LSNs again: under the old name their events would be taken for
        // duplicates.
        producer_name: format!(
            "{}-{system_id}-{timeline}{generation}",
            config.producer_name
        ),
        routing: routing(config).to_string(),
        lanes: u32::try_from(config.lanes).unwrap_or(u32::MAX),
        hashing: config.hashing,
        partition_refresh: config.partition_refresh,
        producer_idle: config.producer_idle,
        compression: config.compression,
        diversion: None,
        rows: None,
        doubts: Doubts::default(),
        schema: config.schema.clone(),
        batch_max_messages: u32::try_from(config.batch_max_messages).unwrap_or(u32::MAX),
        batch_max_bytes: usize::try_from(config.batch_max_bytes).unwrap_or(usize::MAX),
        batch_linger: config.batch_linger,
        max_in_flight_messages: config.max_in_flight_messages,
        max_in_flight_bytes: usize::try_from(config.max_in_flight_bytes).unwrap_or(usize::MAX),
        send_timeout: config.send_timeout,
        meter: Arc::clone(meter),
        reconnect: (config.reconnect_initial, config.reconnect_max),
    }
}

/// When events become stragglers: never, where there is no table for them.
pub(crate) fn diversion(config: &Config, stragglers: Option<&Stragglers>) -> Option<Diversion> {
    stragglers.map(|_| Diversion {
        grace: REFUSED_GRACE,
        age: config.straggler_age,
        unclear: Diversion::UNCLEAR_AGES * config.straggler_age,
        park: config.keep_key_order,
        quiet: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(generation: u64) -> String {
        let config = Config::load(&|_| None, &|name| {
            (name == "PGUSER").then(|| "postgres".to_owned())
        });
        let config = config.expect("all else has a default");
        publisher_config(&config, &Arc::default(), "4711", 3, generation).producer_name
    }

    #[test]
    fn names_of_the_first_generation_are_as_before_and_each_later_one_has_its_own() {
        assert_eq!(name(0), "walpost-walpost-4711-3");
        assert_eq!(name(1), "walpost-walpost-4711-3g1");
        assert_eq!(name(12), "walpost-walpost-4711-3g12");
    }
}
