//! System B: consumes the orders from Pulsar, with the pulsar crate's own consumer (not with code of ours).

use futures::StreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::{Authentication, Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Fact;
use crate::config::Config;
use crate::{Error, Result};

/// Subscribes from the topic's beginning and reports every message until the task is aborted.
pub(super) async fn start(
    config: &Config,
    topic: &str,
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<JoinHandle<Result<()>>> {
    let mut builder = Pulsar::builder(config.pulsar_url.to_string(), TokioExecutor);
    if let Some((name, data)) = config.pulsar_auth.method_and_data().await? {
        if name == "tls" {
            return Err(
                Error::config("the demo's consumer cannot show a client certificate")
                    .hint("give the demo a token, OAuth2 credentials or a password"),
            );
        }
        builder = builder.with_auth(Authentication { name, data });
    }
    if let Some(ca) = &config.pulsar_tls.ca {
        builder = builder
            .with_certificate_chain_file(ca)
            .map_err(|error| Error::temporary("System B: read the CA file").caused_by(error))?;
    }
    let pulsar = builder.build().await.map_err(failed)?;
    let options = ConsumerOptions {
        initial_position: InitialPosition::Earliest,
        ..ConsumerOptions::default()
    };
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription("demo-system-b")
        .with_subscription_type(SubType::Exclusive)
        .with_options(options)
        .build()
        .await
        .map_err(failed)?;
    Ok(tokio::spawn(async move {
        while let Some(message) = consumer.next().await {
            let message = message.map_err(failed)?;
            let at = Instant::now();
            let payload = &message.payload;
            let id = payload
                .metadata
                .properties
                .iter()
                .find(|property| property.key == "id");
            let order: serde_json::Value = serde_json::from_slice(&payload.data)
                .map_err(|error| Error::bug("System B: a message is no JSON").caused_by(error))?;
            let fact = Fact::Received {
                id: id
                    .map(|property| property.value.clone())
                    .unwrap_or_default(),
                customer: payload.metadata.partition_key.clone().unwrap_or_default(),
                number: order["number"].as_u64().unwrap_or_default(),
                at,
            };
            if facts.send(fact).is_err() {
                break;
            }
            consumer
                .ack(&message)
                .await
                .map_err(|error| Error::temporary("System B: acknowledge").caused_by(error))?;
        }
        Ok(())
    }))
}

fn failed(error: pulsar::Error) -> Error {
    Error::temporary("System B: consume from Pulsar").caused_by(error)
}
