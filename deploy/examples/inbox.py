#!/usr/bin/env python3
"""System B in Python: takes stock for each order, once, although the broker may bring an order twice.

    pip install 'pulsar-client==3.13.0' 'psycopg[binary]==3.2.9'
    walpost sql --inbox | psql "$STOCK_DATABASE_URL"
    psql "$STOCK_DATABASE_URL" -c 'create table stock (item text primary key, taken bigint not null default 0)'
    STOCK_DATABASE_URL=postgres://... PULSAR_URL=pulsar://127.0.0.1:6650 \
        python3 inbox.py persistent://public/default/outbox.order

The work and the message id are committed in one transaction, by walpost.inbox_claim, and the broker is told afterwards. A process
that dies at any point loses nothing and takes nothing twice. An order that fails five times is set aside, whole and with the
reason, in walpost.inbox_poison; later ones go on, those of the same key too. An order that kills the process counts as walpost::inbox
counts it: an attempt is counted ahead at an order that failed before and at the first new one of each topic, which is where the
process before ended. What is not the order's fault (no connection, a conflict, a cancelled statement, a full disk) is tried again
for ever and counts as nothing. SIGTERM ends it after the order in hand.
"""

import signal

stopping = []


def listen():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append(True))


if __name__ == "__main__":
    listen()  # before the imports, which take their time: until then SIGTERM kills

import hashlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import psycopg  # noqa: E402
import pulsar  # noqa: E402

CONSUMER = "stock"
MAX_ATTEMPTS = 5
POLL_MS = 500

log = logging.getLogger("inbox")


def take_stock(connection, message):
    """The application's own work, in the transaction of `connection`."""
    order = json.loads(message.data())
    connection.execute(
        "insert into stock as s (item, taken) values (%s, %s)"
        " on conflict (item) do update set taken = s.taken + excluded.taken",
        (order["item"], order["quantity"]),
    )


def inbox_id(message):
    """The message's id as walpost::inbox stores it: a hash where the tables cannot hold it, topic and place where there is none."""
    text = message.properties().get("id")
    if not text:
        place = message.message_id()
        text = f"{message.topic_name()} {place.ledger_id()}:{place.entry_id()}:{place.batch_index()}"
    encoded = text.encode()
    if len(encoded) <= 1000 and "\0" not in text and not text.startswith("walpost-sha256:"):
        return text
    return "walpost-sha256:" + hashlib.sha256(encoded).hexdigest()


UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def inbox_source(message):
    """Where the id is unique, as walpost::inbox has it: a UUID is so everywhere, another id only in its topic."""
    text = message.properties().get("id")
    if not text or UUID.fullmatch(text):
        return ""
    topic = re.sub(r"-partition-[0-9]+$", "", message.topic_name())
    encoded = topic.encode()
    return topic if len(encoded) <= 500 else "walpost-sha256:" + hashlib.sha256(encoded).hexdigest()


def is_of_the_database(error):
    """True for what says nothing of the work, as in walpost::inbox: the same may succeed in a while."""
    while error is not None:
        if isinstance(error, psycopg.InterfaceError):
            return True
        if isinstance(error, psycopg.Error):
            # Without an SQLSTATE: the connection. Else by class: connection, resources, operator intervention (a cancelled statement
            # too), system; or conflicts with others, and a server that is read-only for now.
            code = error.sqlstate
            if code is None:
                return isinstance(error, psycopg.OperationalError)
            return code[:2] in ("08", "53", "57", "58") or code in ("40001", "40003", "40P01", "55P03", "25006")
        error = error.__cause__ or error.__context__
    return False


def storable(text):
    """Postgres' text has no NUL."""
    return text.replace("\0", "\\0")


class Attempt:
    """What is known of the message in hand."""

    def __init__(self, message, is_first):
        self.message = message
        self.id = inbox_id(message)
        self.source = inbox_source(message)
        self.is_first = is_first  # no message of its topic was handled here yet: this one may have ended the process before
        self.is_counted = False  # ahead, since the process may not outlive it
        self.is_duplicate = False


def fail(connection, attempt, reason):
    """Counts a failed attempt; True when it was the last one, and the message is set aside."""
    message = attempt.message
    with connection.transaction():
        attempts = connection.execute(
            "select walpost.inbox_failed(%s, %s, %s, %s, %s)",
            (CONSUMER, attempt.id, reason, attempt.is_counted, attempt.source),
        ).fetchone()[0]
        attempt.is_counted = False
        if attempts < MAX_ATTEMPTS:
            return False
        connection.execute(
            "select walpost.inbox_give_up(%s, %s, %s, %s, %s, %s, %s, %s::json, %s)",
            (CONSUMER, attempt.id, reason, message.topic_name(), str(message.message_id()),
             storable(message.partition_key()), message.data(), json.dumps(message.properties()), attempt.source),
        )
    log.warning("message %s is set aside after %d attempts", attempt.id, attempts)
    return True


def handle_once(connection, attempt):
    """True when the message is dealt with, for good: now, before, or by setting it aside."""
    this = (CONSUMER, attempt.id, attempt.source)
    if not attempt.is_counted:
        new, attempts, reason = connection.execute(
            "select not exists (select from walpost.inbox where consumer = %s and id = %s and source in ('', %s)),"
            " max(attempts), max(reason) from walpost.inbox_poison"
            " where consumer = %s and id = %s and source = %s and set_aside_at is null", this + this
        ).fetchone()
        if new and attempts is not None and attempts >= MAX_ATTEMPTS:
            # It was counted ahead, and nobody was left to set the message aside.
            attempt.is_counted = True
            return fail(connection, attempt, reason)
        if new and (attempt.is_first or attempts is not None):
            connection.execute(
                "select walpost.inbox_failed(%s, %s, 'the process ended during the attempt', source => %s)", this)
            attempt.is_counted = True
    try:
        with connection.transaction():
            # It is deleted together with the work: what is kept of attempts is of messages that are still tried, or set aside.
            connection.execute(
                "delete from walpost.inbox_poison where consumer = %s and id = %s and source in ('', %s) and set_aside_at is null",
                this)
            attempt.is_duplicate = not connection.execute("select walpost.inbox_claim(%s, %s, %s)", this).fetchone()[0]
            if not attempt.is_duplicate:
                take_stock(connection, attempt.message)
            # Postgres answers COMMIT by ROLLBACK, and no error, when a statement failed and its exception was caught: this fails then.
            connection.execute("select 1")
        return True
    except Exception as error:  # noqa: BLE001 - whatever the work raises is a failed attempt
        if connection.closed or is_of_the_database(error):
            # Not the message's fault, and nobody knows whether it was committed: the next attempt finds out.
            raise
        return fail(connection, attempt, storable(f"{type(error).__name__}: {error}"))


def take_back(connection, attempt):
    """The attempt that was counted ahead: a process that is stopped is none that died."""
    this = (CONSUMER, attempt.id, attempt.source)
    where = "where consumer = %s and id = %s and source = %s and set_aside_at is null"
    try:
        with connection.transaction():
            connection.execute(f"update walpost.inbox_poison set attempts = attempts - 1 {where}", this)
            connection.execute(f"delete from walpost.inbox_poison {where} and attempts < 1", this)
    except psycopg.Error as error:
        log.warning("the attempt still counts: %s", error)


def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    listen()
    topic = sys.argv[1]
    client = pulsar.Client(os.environ["PULSAR_URL"], logger=pulsar.ConsoleLogger(pulsar.LoggerLevel.Warn))
    consumer = client.subscribe(
        topic,
        CONSUMER,
        # One instance at a time, another one waits: so a key's orders are taken in their order.
        consumer_type=pulsar.ConsumerType.Failover,
        initial_position=pulsar.InitialPosition.Earliest,
    )
    log.info("consuming %s", topic)
    connection = None
    known = set()  # topics of which a message was handled here
    while not stopping:
        try:
            message = consumer.receive(timeout_millis=POLL_MS)
        except pulsar.Timeout:
            continue
        pause, settled = 0.1, False
        attempt = Attempt(message, message.topic_name() not in known)
        # Tried again here, not by the broker: so the order is kept. What is not settled comes again to whoever consumes next.
        while not settled and not stopping:
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(os.environ["STOCK_DATABASE_URL"], autocommit=True)
                settled = handle_once(connection, attempt)
            except Exception as error:  # noqa: BLE001 - what is somebody's fault is raised again
                lost = isinstance(error, psycopg.Error) if connection is None else connection.closed
                if not (lost or is_of_the_database(error)):
                    raise
                log.warning("not the order's fault, it is tried again: %s: %s", type(error).__name__, error)
            if not settled:
                time.sleep(pause)
                pause = min(pause * 2, 30)
        if attempt.is_counted and not settled:
            take_back(connection, attempt)
        if settled:
            if not attempt.is_duplicate:
                known.add(message.topic_name())
            consumer.acknowledge(message)
            log.info("settled %s", attempt.id)
    client.close()


if __name__ == "__main__":
    main()
