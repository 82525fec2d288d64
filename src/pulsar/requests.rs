//! Requests of one connection that have no answer yet, and how long each may wait.
//!
//! Pure, but for the answers' channels. A request's time begins when its frame is written: until then the broker cannot know of
//! it. A socket that takes no byte for as long while a request waits to be written is dead.
//!
//! `PRODUCER` and `SUBSCRIBE` have two answers: their own, and a `CLOSE_PRODUCER` or `CLOSE_CONSUMER` that comes in its place
//! (`ServerCnx.buildProducerAndAddTopic`, where a topic has moved to another cluster).
//!
//! A broker may complete a creation long after whoever asked has closed the producer, because a close of a producer that is still being authorized
//! is answered at once. So a creation that was not answered for twice the usual time ends, and only its number and its producer's are kept: the answer that comes late names
//! the producer that is to be closed. There is room for [`MAX_LATE`] of them; with more the connection ends, and with it whatever is made late.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use pulsar::message::proto::BaseCommand;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::verdict;
use super::wire::NextBroker;
use crate::{Error, Result};

/// What a client has on a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Resource {
    Producer(u64),
    Consumer(u64),
}

/// What a request opens, and on which topic.
#[derive(Debug)]
struct Opening {
    resource: Resource,
    topic: String,
}

impl Opening {
    fn of(command: &BaseCommand) -> Option<Self> {
        let producer = command.producer.as_ref().map(|producer| Self {
            resource: Resource::Producer(producer.producer_id),
            topic: producer.topic.clone(),
        });
        producer.or_else(|| {
            command.subscribe.as_ref().map(|consumer| Self {
                resource: Resource::Consumer(consumer.consumer_id),
                topic: consumer.topic.clone(),
            })
        })
    }
}

/// A request on its way to the connection's task.
#[derive(Debug)]
pub(super) struct Request {
    pub id: u64,
    opening: Option<Opening>,
    /// A producer that is made late must be known to somebody.
    makes: Option<u64>,
    /// It opens or closes a producer: its end, too, comes behind the receipts that came before.
    of_producer: bool,
    reply: oneshot::Sender<Result<BaseCommand>>,
}

impl Request {
    pub(super) fn new(
        id: u64,
        command: &BaseCommand,
        reply: oneshot::Sender<Result<BaseCommand>>,
    ) -> Self {
        Self {
            id,
            opening: Opening::of(command),
            makes: command
                .producer
                .as_ref()
                .map(|producer| producer.producer_id),
            of_producer: command.producer.is_some() || command.close_producer.is_some(),
            reply,
        }
    }
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    is_written: bool,
}

/// Creations that were given up and may complete: some MiB at most.
const MAX_LATE: usize = 65_536;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Requests {
    timeout: Duration,
    waiting: HashMap<u64, Waiting>,
    opening: HashMap<Resource, u64>,
    /// When the written ones are due, earliest first; what is answered stays until its turn comes.
    due: VecDeque<(Instant, u64)>,
    /// The same for creations.
    due_creations: VecDeque<(Instant, u64)>,
    /// The producers of creations that were given up, by request.
    late: HashMap<u64, u64>,
    /// Those of them that were made.
    to_close: Vec<u64>,
    /// How many are not written.
    unwritten: usize,
    /// When there was last none of those, or the socket took bytes.
    progress_at: Instant,
}

impl Requests {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            timeout,
            waiting: HashMap::new(),
            opening: HashMap::new(),
            due: VecDeque::new(),
            due_creations: VecDeque::new(),
            late: HashMap::new(),
            to_close: Vec::new(),
            unwritten: 0,
            progress_at: now,
        }
    }

    /// A request whose frame is queued.
    pub(super) fn add(&mut self, request: Request, now: Instant) {
        if self.unwritten == 0 {
            self.progress_at = now;
        }
        self.unwritten += 1;
        if let Some(opening) = &request.opening {
            self.opening.insert(opening.resource, request.id);
        }
        let id = request.id;
        let is_written = false;
        self.waiting.insert(
            id,
            Waiting {
                request,
                is_written,
            },
        );
    }

    /// True when the socket's progress is of interest.
    pub(super) fn wait_for_socket(&self) -> bool {
        self.unwritten > 0
    }

    /// The socket took bytes.
    pub(super) fn socket_took_bytes(&mut self, now: Instant) {
        self.progress_at = now;
    }

    /// A request's frame was written to its end.
    pub(super) fn written(&mut self, id: u64, now: Instant) {
        if let Some(waiting) = self.waiting.get_mut(&id)
            && !std::mem::replace(&mut waiting.is_written, true)
        {
            self.unwritten -= 1;
            if waiting.request.makes.is_some() {
                self.due_creations.push_back((now + 2 * self.timeout, id));
            } else {
                self.due.push_back((now + self.timeout, id));
            }
        }
    }

    /// An answer came; one that nobody waits for is dropped.
    pub(super) fn answer(&mut self, id: u64, command: BaseCommand) {
        let late = self.late.remove(&id);
        self.to_close
            .extend(late.filter(|_| command.producer_success.is_some()));
        self.end(id, Ok(command));
    }

    /// A producer that was made too late, and is to be closed.
    pub(super) fn next_to_close(&mut self) -> Option<u64> {
        self.to_close.pop()
    }

    /// The broker closed something; true when that was the answer to the request that opens it.
    pub(super) fn closed(&mut self, resource: Resource, next_broker: Option<&NextBroker>) -> bool {
        let Some(&id) = self.opening.get(&resource) else {
            return false;
        };
        let waiting = self.waiting.get(&id);
        let opening = waiting.and_then(|waiting| waiting.request.opening.as_ref());
        let topic = opening.map_or("", |opening| &opening.topic);
        let error = verdict::closed_at_open(topic, next_broker.cloned());
        self.end(id, Err(error));
        true
    }

    /// When something is to be done next, if nothing else happens.
    pub(super) fn next_deadline(&mut self) -> Option<Instant> {
        for due in [&mut self.due, &mut self.due_creations] {
            while let Some((_, id)) = due.front() {
                if self.waiting.contains_key(id) {
                    break;
                }
                due.pop_front();
            }
        }
        let answer = self.due.front().map(|(at, _)| *at);
        let creation = self.due_creations.front().map(|(at, _)| *at);
        let socket = (self.unwritten > 0).then(|| self.progress_at + self.timeout);
        [answer, creation, socket].into_iter().flatten().min()
    }

    /// Ends the requests that have waited for too long; an error when the socket is dead, or too many creations may complete late.
    pub(super) fn expire(&mut self, now: Instant) -> std::result::Result<(), String> {
        while let Some(&(at, id)) = self.due.front()
            && at <= now
        {
            self.due.pop_front();
            self.end(id, Err(verdict::not_answered()));
        }
        while let Some(&(at, id)) = self.due_creations.front()
            && at <= now
        {
            self.due_creations.pop_front();
            let Some(waiting) = self.waiting.get(&id) else {
                continue;
            };
            if let Some(producer_id) = waiting.request.makes {
                self.late.insert(id, producer_id);
            }
            let error = Error::temporary("the Pulsar broker does not answer for a producer");
            self.end(id, Err(error));
        }
        if self.late.len() > MAX_LATE {
            return Err(format!(
                "the broker has not answered for {} producers",
                self.late.len()
            ));
        }
        if self.unwritten > 0 && self.progress_at + self.timeout <= now {
            return Err(format!(
                "the broker has taken no byte for {:?} while a request waits",
                self.timeout
            ));
        }
        Ok(())
    }

    /// The connection has ended: nothing more is written, and only those that open or close producers are waited for.
    pub(super) fn end_questions(&mut self) {
        self.waiting
            .retain(|_, waiting| waiting.request.of_producer);
    }

    fn end(&mut self, id: u64, result: Result<BaseCommand>) {
        let Some(waiting) = self.waiting.remove(&id) else {
            return;
        };
        if !waiting.is_written {
            self.unwritten -= 1;
        }
        if let Some(opening) = &waiting.request.opening
            && self.opening.get(&opening.resource) == Some(&id)
        {
            self.opening.remove(&opening.resource);
        }
        let _gave_up = waiting.request.reply.send(result);
    }
}

#[cfg(test)]
mod tests {
    use pulsar::message::proto::{CommandProducer, CommandProducerSuccess};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);
    const SECOND: Duration = Duration::from_secs(1);
    const ALMOST: Duration = Duration::from_secs(29);

    type Answer = oneshot::Receiver<Result<BaseCommand>>;

    fn begin() -> (Requests, Instant) {
        let now = Instant::now();
        (Requests::new(TIMEOUT, now), now)
    }

    fn request(id: u64, command: &BaseCommand) -> (Request, Answer) {
        let (reply, answer) = oneshot::channel();
        (Request::new(id, command, reply), answer)
    }

    fn add(requests: &mut Requests, id: u64, now: Instant) -> Answer {
        let (request, answer) = request(id, &BaseCommand::default());
        requests.add(request, now);
        answer
    }

    #[test]
    fn the_time_of_a_request_begins_when_it_is_written() {
        // GIVEN a request that waits behind a socket that takes some bytes now and then
        let (mut requests, begin) = begin();
        let mut answer = add(&mut requests, 1, begin);
        let mut now = begin;
        for _ in 0..5 {
            now += ALMOST;
            requests.expire(now).unwrap();
            requests.socket_took_bytes(now);
        }
        assert!(answer.try_recv().is_err(), "has not ended");

        // WHEN it is written
        requests.written(1, now);

        // THEN it has its whole time
        assert_eq!(requests.next_deadline(), Some(now + TIMEOUT));
        requests.expire(now + ALMOST).unwrap();
        assert!(answer.try_recv().is_err(), "has not ended");
        requests.expire(now + TIMEOUT).unwrap();
        let error = answer.try_recv().unwrap().unwrap_err();
        assert!(error.to_string().contains("does not answer"), "{error}");
        // It is given up where other topics get receipts.
        assert_eq!(verdict::fault(&error), verdict::Fault::Unclear);
        assert_eq!(requests.next_deadline(), None);
    }

    #[test]
    fn a_socket_that_takes_no_byte_while_a_request_waits_is_dead() {
        let (mut requests, begin) = begin();
        // Nothing waits: it is not asked for anything.
        assert_eq!(requests.next_deadline(), None);
        requests.expire(begin + 2 * TIMEOUT).unwrap();

        let asked = begin + 2 * TIMEOUT;
        let _answer = add(&mut requests, 1, asked);
        let later = add(&mut requests, 2, asked + SECOND);
        assert_eq!(requests.next_deadline(), Some(asked + TIMEOUT));
        requests.expire(asked + ALMOST).unwrap();
        let reason = requests.expire(asked + TIMEOUT).unwrap_err();
        assert!(reason.contains("no byte"), "{reason}");
        drop(later);
    }

    #[test]
    fn written_requests_end_in_their_order_and_answers_are_passed_on() {
        let (mut requests, begin) = begin();
        let mut answers: Vec<_> = (1..=3).map(|id| add(&mut requests, id, begin)).collect();
        for id in 1..=3 {
            requests.written(id, begin + u32::try_from(id).unwrap() * SECOND);
        }
        assert!(!requests.wait_for_socket());
        requests.answer(1, BaseCommand::default());
        assert!(answers[0].try_recv().unwrap().is_ok());
        assert_eq!(requests.next_deadline(), Some(begin + 2 * SECOND + TIMEOUT));
        requests.expire(begin + 2 * SECOND + TIMEOUT).unwrap();
        assert!(answers[1].try_recv().unwrap().is_err());
        assert!(answers[2].try_recv().is_err(), "has not ended");
        // An answer that comes too late, or twice, is nothing.
        requests.answer(2, BaseCommand::default());
        requests.answer(1, BaseCommand::default());
    }

    /// A request for this producer that is written now.
    fn create(requests: &mut Requests, id: u64, producer_id: u64, now: Instant) -> Answer {
        let command = BaseCommand {
            producer: Some(CommandProducer {
                producer_id,
                ..CommandProducer::default()
            }),
            ..BaseCommand::default()
        };
        let (request, answer) = request(id, &command);
        requests.add(request, now);
        requests.written(id, now);
        answer
    }

    #[test]
    fn a_creation_without_an_answer_ends_and_the_producer_is_closed_when_it_is_made_late() {
        // GIVEN two creations that the broker does not answer
        let (mut requests, begin) = begin();
        let mut answers = [
            create(&mut requests, 1, 11, begin),
            create(&mut requests, 2, 12, begin),
        ];
        assert_eq!(requests.next_deadline(), Some(begin + 2 * TIMEOUT));
        requests.expire(begin + TIMEOUT + ALMOST).unwrap();
        assert!(answers[0].try_recv().is_err(), "has not ended");

        // WHEN their time is over THEN nobody waits any more
        requests.expire(begin + 2 * TIMEOUT).unwrap();
        for answer in &mut answers {
            assert!(answer.try_recv().unwrap().is_err());
        }
        assert!(requests.waiting.is_empty() && requests.opening.is_empty());
        assert_eq!(requests.next_deadline(), None);

        // WHEN one is made late, and the other refused THEN the one is to be closed, once
        let made = BaseCommand {
            producer_success: Some(CommandProducerSuccess::default()),
            ..BaseCommand::default()
        };
        requests.answer(1, made.clone());
        requests.answer(2, BaseCommand::default());
        requests.answer(1, made);
        assert_eq!(requests.next_to_close(), Some(11));
        assert_eq!(requests.next_to_close(), None);
        assert!(requests.late.is_empty());
    }

    #[test]
    fn a_broker_that_answers_for_no_producer_is_left_before_they_are_too_many() {
        let (mut requests, mut now) = begin();
        let id_of = |count: usize| u64::try_from(count).unwrap();
        for count in 0..MAX_LATE {
            drop(create(&mut requests, id_of(count), id_of(count), now));
        }
        now += 2 * TIMEOUT;
        requests.expire(now).unwrap();
        let count = id_of(MAX_LATE);
        drop(create(&mut requests, count, count, now));
        let reason = requests.expire(now + 2 * TIMEOUT).unwrap_err();
        assert!(reason.contains("has not answered"), "{reason}");
    }

    #[test]
    fn a_producer_that_is_closed_while_it_is_being_created_has_its_answer() {
        // GIVEN a request for a producer
        let (mut requests, now) = begin();
        let command = BaseCommand {
            producer: Some(CommandProducer {
                topic: "topic-1".to_owned(),
                producer_id: 7,
                ..CommandProducer::default()
            }),
            ..BaseCommand::default()
        };
        let (request, mut answer) = request(1, &command);
        requests.add(request, now);
        requests.written(1, now);
        let next = NextBroker {
            url: Some("pulsar://elsewhere:6650".to_owned()),
            ..NextBroker::default()
        };
        assert!(!requests.closed(Resource::Producer(8), None));
        assert!(!requests.closed(Resource::Consumer(7), None));
        assert!(answer.try_recv().is_err(), "has not ended");

        // WHEN the broker closes it
        assert!(requests.closed(Resource::Producer(7), Some(&next)));

        // THEN the request ends at once, as the topic's trouble, and tells where the topic is
        let error = answer.try_recv().unwrap().unwrap_err();
        assert!(error.to_string().contains("topic-1"), "{error}");
        assert_eq!(verdict::fault(&error), verdict::Fault::Unclear);
        assert_eq!(verdict::next_broker(&error), Some(&next));
        // AND a second close is about nothing that is being opened
        assert!(!requests.closed(Resource::Producer(7), None));
    }
}
