//! The commands that keep a connection: CONNECT, challenges, PING and PONG, the end of a producer; and which request an
//! answer belongs to.
//!
//! Pure: input and output are the protocol's types (`PulsarApi.proto`) and frames.

use bytes::Bytes;
use pulsar::message::proto::{
    AuthData, BaseCommand, CommandAuthResponse, CommandCloseProducer, CommandConnect, CommandPing,
    CommandPong, FeatureFlags, base_command::Type,
};

use super::auth::Credentials;
use super::socket::Endpoint;
use super::wire::encode_command;

const CLIENT_VERSION: &str = concat!("walpost-", env!("CARGO_PKG_VERSION"));
/// 19 is that of the `PulsarApi.proto` that our commands are generated from. 20 adds `TOPIC_MIGRATED` (see `wire`); without it a
/// broker never says where a topic has moved to, and never answers the request for a producer on such a topic
/// (`PulsarCommandSenderImpl.sendTopicMigrated`).
const PROTOCOL_VERSION: i32 = 20;

pub(super) fn connect(endpoint: &Endpoint, credentials: &Credentials) -> BaseCommand {
    BaseCommand {
        r#type: Type::Connect as i32,
        connect: Some(CommandConnect {
            client_version: CLIENT_VERSION.to_owned(),
            auth_method_name: credentials.method.map(str::to_owned),
            auth_data: credentials.data(),
            protocol_version: Some(PROTOCOL_VERSION),
            proxy_to_broker_url: endpoint.via_proxy_to.clone(),
            feature_flags: Some(FeatureFlags {
                supports_auth_refresh: Some(true),
                supports_broker_entry_metadata: Some(false),
                supports_partial_producer: Some(false),
            }),
            ..CommandConnect::default()
        }),
        ..BaseCommand::default()
    }
}

pub(super) fn auth_response(credentials: &Credentials) -> Bytes {
    encode_command(&BaseCommand {
        r#type: Type::AuthResponse as i32,
        auth_response: Some(CommandAuthResponse {
            client_version: Some(CLIENT_VERSION.to_owned()),
            response: Some(AuthData {
                auth_method_name: credentials.method.map(str::to_owned),
                auth_data: credentials.data(),
            }),
            protocol_version: Some(PROTOCOL_VERSION),
        }),
        ..BaseCommand::default()
    })
}

pub(super) fn request_id(command: &BaseCommand) -> Option<u64> {
    command
        .producer_success
        .as_ref()
        .map(|answer| answer.request_id)
        .or_else(|| command.success.as_ref().map(|answer| answer.request_id))
        .or_else(|| {
            command
                .lookup_topic_response
                .as_ref()
                .map(|answer| answer.request_id)
        })
        .or_else(|| {
            command
                .partition_metadata_response
                .as_ref()
                .map(|answer| answer.request_id)
        })
        .or_else(|| {
            command
                .get_last_message_id_response
                .as_ref()
                .map(|answer| answer.request_id)
        })
        .or_else(|| command.error.as_ref().map(|answer| answer.request_id))
}

pub(super) fn close_producer(producer_id: u64, request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::CloseProducer as i32,
        close_producer: Some(CommandCloseProducer {
            producer_id,
            request_id,
        }),
        ..BaseCommand::default()
    }
}

pub(super) fn ping() -> Bytes {
    let ping = Some(CommandPing {});
    encode_command(&BaseCommand {
        r#type: Type::Ping as i32,
        ping,
        ..BaseCommand::default()
    })
}

pub(super) fn pong() -> Bytes {
    let pong = Some(CommandPong {});
    encode_command(&BaseCommand {
        r#type: Type::Pong as i32,
        pong,
        ..BaseCommand::default()
    })
}
