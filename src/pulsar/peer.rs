//! The far side of a connection, for unit tests: it answers CONNECT, PING and questions for partitions, where the test lets it.
//!
//! The scripted broker of the integration tests (`tests/support/fake_broker.rs`) is much more; this one is for what is inside the
//! crate: times of requests, and sockets that nobody reads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use pulsar::message::proto::{
    BaseCommand, CommandConnected, CommandPartitionedTopicMetadataResponse, base_command::Type,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::auth::Auth;
use super::command::pong;
use super::connection::Manner;
use super::wire::{decode_command, encode_command};

/// How the connections of unit tests are made.
pub(super) fn manner() -> Manner {
    Manner {
        auth: Auth::default(),
        tls: None,
        keepalive_interval: Duration::from_secs(30),
        lease: crate::lease::Lease::default(),
    }
}

/// `CONNECTED` with this limit.
pub(super) fn connected(max_message_size: i32) -> bytes::Bytes {
    encode_command(&BaseCommand {
        r#type: Type::Connected as i32,
        connected: Some(CommandConnected {
            server_version: "peer".to_owned(),
            protocol_version: Some(20),
            max_message_size: Some(max_message_size),
        }),
        ..BaseCommand::default()
    })
}

/// The next command on a socket, with what stands behind it in its frame left out.
pub(super) async fn read_command(
    stream: &mut TcpStream,
    inbox: &mut BytesMut,
) -> Option<BaseCommand> {
    loop {
        if let Some(incoming) = decode_command(inbox).expect("whole frames") {
            return Some(incoming.command);
        }
        if stream.read_buf(inbox).await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

/// Listens, and serves each connection until the value is dropped.
pub(super) struct Peer {
    address: SocketAddr,
    questions: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Peer {
    /// `answers` says for the connection's number and a command whether it is answered.
    pub(super) fn start(
        answers: impl Fn(usize, &BaseCommand) -> bool + Send + Sync + 'static,
    ) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let address = listener.local_addr().unwrap();
        let questions = Arc::new(AtomicUsize::new(0));
        let (answers, asked) = (Arc::new(answers), Arc::clone(&questions));
        let accepting = tokio::spawn(async move {
            let mut serving = JoinSet::new();
            for number in 0.. {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                let (answers, asked) = (Arc::clone(&answers), Arc::clone(&asked));
                serving.spawn(serve(stream, asked, move |command: &BaseCommand| {
                    answers(number, command)
                }));
            }
        });
        Self {
            address,
            questions,
            accepting,
        }
    }

    pub(super) fn host(&self) -> (String, u16) {
        (self.address.ip().to_string(), self.address.port())
    }

    /// How many questions for partitions came.
    pub(super) fn questions(&self) -> usize {
        self.questions.load(Ordering::Relaxed)
    }

    /// Refuses connections from now on.
    pub(super) async fn stop(&self) {
        self.accepting.abort();
        while !self.accepting.is_finished() {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    questions: Arc<AtomicUsize>,
    answers: impl Fn(&BaseCommand) -> bool,
) {
    let mut inbox = BytesMut::new();
    while let Some(command) = read_command(&mut stream, &mut inbox).await {
        if command.partition_metadata.is_some() {
            questions.fetch_add(1, Ordering::Relaxed);
        }
        if !answers(&command) {
            continue;
        }
        let answer = if command.connect.is_some() {
            connected(5 * 1024 * 1024)
        } else if command.ping.is_some() {
            pong()
        } else if let Some(question) = command.partition_metadata {
            encode_command(&BaseCommand {
                r#type: Type::PartitionedMetadataResponse as i32,
                partition_metadata_response: Some(CommandPartitionedTopicMetadataResponse {
                    partitions: Some(0),
                    request_id: question.request_id,
                    ..CommandPartitionedTopicMetadataResponse::default()
                }),
                ..BaseCommand::default()
            })
        } else {
            continue;
        };
        if stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}
