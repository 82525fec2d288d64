//! Reaching a server whose name may have several addresses.
//!
//! Input: a name and a port. Output: a TCP connection to one of its addresses. An address that does not answer keeps none of the others
//! waiting: after [`HEAD_START`] the next one is tried beside it (as RFC 8305, 5). Postgres' addresses are tried by
//! `postgres::connection`, as libpq does it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// How long an address is tried by itself. Well above a connection's time between continents.
const HEAD_START: Duration = Duration::from_millis(500);

/// Connects within `limit`. The first `skip` addresses are tried behind the others: one that accepts connections may still not serve them.
///
/// # Errors
/// The last address's; `NotFound` for a name without any.
pub(crate) async fn reach(
    host: &str,
    port: u16,
    skip: usize,
    limit: Duration,
) -> io::Result<TcpStream> {
    let connecting = async {
        let mut addresses: Vec<SocketAddr> = lookup_host((host, port)).await?.collect();
        let first = skip.checked_rem(addresses.len()).unwrap_or(0);
        addresses.rotate_left(first);
        reach_any(addresses).await
    };
    timeout(limit, connecting)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The first connection that is made to any of these; the attempts that are left end with it.
async fn reach_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.into_iter();
    let mut trying = JoinSet::new();
    let mut failure = io::Error::from(io::ErrorKind::NotFound);
    loop {
        if let Some(address) = addresses.next() {
            trying.spawn(TcpStream::connect(address));
        }
        let has_more = addresses.len() > 0;
        tokio::select! {
            biased;
            tried = trying.join_next() => match tried {
                Some(Ok(Ok(stream))) => return Ok(stream),
                Some(Ok(Err(error))) => failure = error,
                Some(Err(error)) => failure = io::Error::other(error),
                None => return Err(failure),
            },
            () = sleep(HEAD_START), if has_more => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);
    /// More than a listener with the smallest queue keeps.
    const FILLERS: usize = 16;

    /// An address that answers no attempt: its listener's queue is full. Lasts as long as the value.
    async fn silent() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut fillers = Vec::new();
        for _ in 0..FILLERS {
            let filling = timeout(Duration::from_millis(300), TcpStream::connect(address));
            match filling.await {
                Ok(filler) => fillers.push(filler.unwrap()),
                Err(_) => return (address, listener, fillers),
            }
        }
        panic!("{FILLERS} connections and still not full");
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_keeps_no_other_waiting() {
        // GIVEN a name whose first address is silent and whose second refuses connections
        let (silent, _listener, _fillers) = silent().await;
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refuses = gone.local_addr().unwrap();
        drop(gone);
        let well = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let answers = well.local_addr().unwrap();

        // THEN the third is reached, although the kernel tries the first one for longer
        let reached = timeout(DEADLINE, reach_any(vec![silent, refuses, answers])).await;
        let reached = reached.expect("in time").unwrap();
        assert_eq!(reached.peer_addr().unwrap(), answers);
    }

    #[tokio::test]
    async fn the_error_is_that_of_an_address() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refuses = gone.local_addr().unwrap();
        drop(gone);
        let error = reach_any(vec![refuses, refuses]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let error = reach_any(Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
