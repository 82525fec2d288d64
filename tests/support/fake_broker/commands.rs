//! What a broker says, as frames.

use prost::Message as _;
use pulsar::message::proto::{
    AuthData, BaseCommand, CommandAuthChallenge, CommandConnected, CommandError,
    CommandLookupTopicResponse, CommandPartitionedTopicMetadataResponse, CommandPing, CommandPong,
    CommandProducerSuccess, CommandSendError, CommandSendReceipt, CommandSuccess, MessageIdData,
    ServerError, base_command::Type, command_lookup_topic_response::LookupType,
    command_partitioned_topic_metadata_response as partitions,
};

use super::super::wire::command_frame;
use super::script::{Asked, Target};

/// The newest protocol that the crate's commands know.
const PROTOCOL_VERSION: i32 = 19;
/// What a broker says in the place of a request id where nothing was asked.
pub(super) const UNASKED: u64 = u64::MAX;

fn command(kind: Type) -> BaseCommand {
    BaseCommand {
        r#type: kind.into(),
        ..BaseCommand::default()
    }
}

pub(super) fn connected(max_message_size: Option<i32>) -> Vec<u8> {
    command_frame(&BaseCommand {
        connected: Some(CommandConnected {
            server_version: "fake".to_owned(),
            protocol_version: Some(PROTOCOL_VERSION),
            max_message_size,
        }),
        ..command(Type::Connected)
    })
}

pub(super) fn auth_challenge() -> Vec<u8> {
    command_frame(&BaseCommand {
        auth_challenge: Some(CommandAuthChallenge {
            server_version: Some("fake".to_owned()),
            challenge: Some(AuthData {
                auth_method_name: Some("token".to_owned()),
                auth_data: Some(b"PulsarAuthRefresh".to_vec()),
            }),
            protocol_version: Some(PROTOCOL_VERSION),
        }),
        ..command(Type::AuthChallenge)
    })
}

pub(super) fn partitions(request_id: u64, count: u32) -> Vec<u8> {
    command_frame(&BaseCommand {
        partition_metadata_response: Some(CommandPartitionedTopicMetadataResponse {
            partitions: Some(count),
            request_id,
            response: Some(partitions::LookupType::Success.into()),
            ..CommandPartitionedTopicMetadataResponse::default()
        }),
        ..command(Type::PartitionedMetadataResponse)
    })
}

pub(super) fn found(request_id: u64, target: &Target) -> Vec<u8> {
    let response = if target.redirect {
        LookupType::Redirect
    } else {
        LookupType::Connect
    };
    command_frame(&BaseCommand {
        lookup_topic_response: Some(CommandLookupTopicResponse {
            broker_service_url: Some(target.url.clone()),
            response: Some(response.into()),
            request_id,
            authoritative: Some(target.authoritative),
            proxy_through_service_url: Some(target.through_service_url),
            ..CommandLookupTopicResponse::default()
        }),
        ..command(Type::LookupResponse)
    })
}

pub(super) fn producer_success(
    request_id: u64,
    name: &str,
    last_sequence_id: Option<u64>,
    ready: bool,
) -> Vec<u8> {
    let last = last_sequence_id.and_then(|id| i64::try_from(id).ok());
    command_frame(&BaseCommand {
        producer_success: Some(CommandProducerSuccess {
            request_id,
            producer_name: name.to_owned(),
            last_sequence_id: Some(last.unwrap_or(-1)),
            producer_ready: Some(ready),
            ..CommandProducerSuccess::default()
        }),
        ..command(Type::ProducerSuccess)
    })
}

pub(super) fn success(request_id: u64) -> Vec<u8> {
    command_frame(&BaseCommand {
        success: Some(CommandSuccess {
            request_id,
            ..CommandSuccess::default()
        }),
        ..command(Type::Success)
    })
}

/// A receipt; without an entry it is the (-1, -1) of a duplicate.
pub(super) fn receipt(producer_id: u64, ids: (u64, u64), entry: Option<u64>) -> Vec<u8> {
    command_frame(&BaseCommand {
        send_receipt: Some(CommandSendReceipt {
            producer_id,
            sequence_id: ids.0,
            message_id: Some(MessageIdData {
                ledger_id: entry.map_or(u64::MAX, |_| 1),
                entry_id: entry.unwrap_or(u64::MAX),
                ..MessageIdData::default()
            }),
            highest_sequence_id: Some(ids.1),
        }),
        ..command(Type::SendReceipt)
    })
}

/// The refusal of a send; real brokers name a batch's highest id.
pub(super) fn send_error(
    producer_id: u64,
    sequence_id: u64,
    error: ServerError,
    text: &str,
) -> Vec<u8> {
    command_frame(&BaseCommand {
        send_error: Some(CommandSendError {
            producer_id,
            sequence_id,
            error: error.into(),
            message: text.to_owned(),
        }),
        ..command(Type::SendError)
    })
}

pub(super) fn ping() -> Vec<u8> {
    command_frame(&BaseCommand {
        ping: Some(CommandPing {}),
        ..command(Type::Ping)
    })
}

pub(super) fn pong() -> Vec<u8> {
    command_frame(&BaseCommand {
        pong: Some(CommandPong {}),
        ..command(Type::Pong)
    })
}

/// The refusal of a request, in the form that belongs to it.
pub(super) fn refusal(asked: Asked, request_id: u64, error: ServerError, text: &str) -> Vec<u8> {
    let message = Some(text.to_owned());
    let code = Some(error.into());
    command_frame(&match asked {
        Asked::Partitions => BaseCommand {
            partition_metadata_response: Some(CommandPartitionedTopicMetadataResponse {
                request_id,
                response: Some(partitions::LookupType::Failed.into()),
                error: code,
                message,
                ..CommandPartitionedTopicMetadataResponse::default()
            }),
            ..command(Type::PartitionedMetadataResponse)
        },
        Asked::Lookup => BaseCommand {
            lookup_topic_response: Some(CommandLookupTopicResponse {
                request_id,
                response: Some(LookupType::Failed.into()),
                error: code,
                message,
                ..CommandLookupTopicResponse::default()
            }),
            ..command(Type::LookupResponse)
        },
        _ => BaseCommand {
            error: Some(CommandError {
                request_id,
                error: error.into(),
                message: text.to_owned(),
            }),
            ..command(Type::Error)
        },
    })
}

/// The sentence that goes with an error of a script, to be found again in a log.
pub(crate) fn reason(error: ServerError) -> String {
    format!("the fake broker says {}", error.as_str_name())
}

/// The broker closes a producer. Newer brokers name the next one (`CommandCloseProducer` of the present
/// `PulsarApi.proto`), which the crate's older commands cannot say.
pub(crate) fn close_producer(producer_id: u64, next: Option<&str>) -> Vec<u8> {
    command_frame(&CloseProducerCommand {
        r#type: Type::CloseProducer.into(),
        close_producer: CloseProducer {
            producer_id,
            request_id: UNASKED,
            assigned_broker_service_url: next.map(str::to_owned),
            assigned_broker_service_url_tls: None,
        },
    })
}

#[derive(Clone, PartialEq, prost::Message)]
struct CloseProducerCommand {
    #[prost(int32, required, tag = "1")]
    r#type: i32,
    #[prost(message, required, tag = "15")]
    close_producer: CloseProducer,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CloseProducer {
    #[prost(uint64, required, tag = "1")]
    producer_id: u64,
    #[prost(uint64, required, tag = "2")]
    request_id: u64,
    #[prost(string, optional, tag = "3")]
    assigned_broker_service_url: Option<String>,
    #[prost(string, optional, tag = "4")]
    assigned_broker_service_url_tls: Option<String>,
}

/// The topic is at another cluster now (`CommandTopicMigrated`, which the crate's older commands cannot say).
pub(crate) fn topic_migrated(producer_id: u64, url: &str) -> Vec<u8> {
    command_frame(&TopicMigratedCommand {
        r#type: TOPIC_MIGRATED,
        topic_migrated: TopicMigrated {
            resource_id: producer_id,
            // A producer.
            resource_type: 0,
            broker_service_url: Some(url.to_owned()),
        },
    })
}

/// `BaseCommand.Type.TOPIC_MIGRATED`.
const TOPIC_MIGRATED: i32 = 68;

#[derive(Clone, PartialEq, prost::Message)]
struct TopicMigratedCommand {
    #[prost(int32, required, tag = "1")]
    r#type: i32,
    #[prost(message, required, tag = "68")]
    topic_migrated: TopicMigrated,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TopicMigrated {
    #[prost(uint64, required, tag = "1")]
    resource_id: u64,
    #[prost(int32, required, tag = "2")]
    resource_type: i32,
    #[prost(string, optional, tag = "3")]
    broker_service_url: Option<String>,
}

/// Whether a question for partitions may make the topic (`metadata_auto_creation_enabled` of PIP-344, true where it is left
/// out), which the crate's older commands do not know.
pub(super) fn may_create(command: &[u8]) -> bool {
    let question = PartitionsCommand::decode(command).unwrap_or_default();
    let asked = question.partition_metadata;
    asked.and_then(|asked| asked.may_create).unwrap_or(true)
}

#[derive(Clone, PartialEq, prost::Message)]
struct PartitionsCommand {
    #[prost(message, optional, tag = "21")]
    partition_metadata: Option<Partitions>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Partitions {
    #[prost(bool, optional, tag = "6")]
    may_create: Option<bool>,
}
