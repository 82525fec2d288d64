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
process before ended. SIGTERM ends it after the order in hand.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import time

import psycopg
import pulsar

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


def storable(text):
    """Postgres' text has no NUL."""
    return text.replace("\0", "\\0")


class Attempt:
    """What is known of the message in hand."""

    def __init__(self, message, is_first):
        self.message = message
        self.id = inbox_id(message)
        self.is_first = is_first  # no message of its topic was handled here yet: this one may have ended the process before
        self.is_counted = False  # ahead, since the process may not outlive it
        self.is_duplicate = False


def fail(connection, attempt, reason):
    """Counts a failed attempt; True when it was the last one, and the message is set aside."""
    message = attempt.message
    with connection.transaction():
        attempts = connection.execute(
            "select walpost.inbox_failed(%s, %s, %s, %s)", (CONSUMER, attempt.id, reason, attempt.is_counted)
        ).fetchone()[0]
        attempt.is_counted = False
        if attempts < MAX_ATTEMPTS:
            return False
        connection.execute(
            "select walpost.inbox_give_up(%s, %s, %s, %s, %s, %s, %s, %s::json)",
            (CONSUMER, attempt.id, reason, message.topic_name(), str(message.message_id()),
             storable(message.partition_key()), message.data(), json.dumps(message.properties())),
        )
    log.warning("message %s is set aside after %d attempts", attempt.id, attempts)
    return True


def handle_once(connection, attempt):
    """True when the message is dealt with, for good: now, before, or by setting it aside."""
    this = (CONSUMER, attempt.id)
    if not attempt.is_counted:
        new, attempts, reason = connection.execute(
            "select not exists (select from walpost.inbox where consumer = %s and id = %s), max(attempts), max(reason)"
            " from walpost.inbox_poison where consumer = %s and id = %s and set_aside_at is null", this + this
        ).fetchone()
        if new and attempts is not None and attempts >= MAX_ATTEMPTS:
            # It was counted ahead, and nobody was left to set the message aside.
            attempt.is_counted = True
            return fail(connection, attempt, reason)
        if new and (attempt.is_first or attempts is not None):
            connection.execute("select walpost.inbox_failed(%s, %s, 'the process ended during the attempt')", this)
            attempt.is_counted = True
    try:
        with connection.transaction():
            # It is deleted together with the work: what is kept of attempts is of messages that are still tried, or set aside.
            connection.execute(
                "delete from walpost.inbox_poison where consumer = %s and id = %s and set_aside_at is null", this)
            attempt.is_duplicate = not connection.execute("select walpost.inbox_claim(%s, %s)", this).fetchone()[0]
            if not attempt.is_duplicate:
                take_stock(connection, attempt.message)
            # Postgres answers COMMIT by ROLLBACK, and no error, when a statement failed and its exception was caught: this fails then.
            connection.execute("select 1")
        return True
    except (psycopg.OperationalError, psycopg.InterfaceError):
        # Not the message's fault, and nobody knows whether it was committed: the next attempt finds out.
        raise
    except Exception as error:  # noqa: BLE001 - whatever the work raises is a failed attempt
        return fail(connection, attempt, storable(f"{type(error).__name__}: {error}"))


def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    topic = sys.argv[1]
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    client = pulsar.Client(os.environ["PULSAR_URL"], logger=pulsar.ConsoleLogger(pulsar.LoggerLevel.Warn))
    consumer = client.subscribe(
        topic,
        CONSUMER,
        # One instance at a time, another one waits: so a key's orders are taken in their order.
        consumer_type=pulsar.ConsumerType.Failover,
        initial_position=pulsar.InitialPosition.Earliest,
    )
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
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                log.warning("the database is away: %s", error)
                connection = None
            if not settled:
                time.sleep(pause)
                pause = min(pause * 2, 30)
        if settled:
            if not attempt.is_duplicate:
                known.add(message.topic_name())
            consumer.acknowledge(message)
            log.info("settled %s", attempt.id)
    client.close()


if __name__ == "__main__":
    main()
