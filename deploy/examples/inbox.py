#!/usr/bin/env python3
"""System B in Python: takes stock for each order, once, although the broker may bring an order twice.

    pip install 'pulsar-client==3.13.0' 'psycopg[binary]==3.2.9'
    walpost sql --inbox | psql "$STOCK_DATABASE_URL"
    psql "$STOCK_DATABASE_URL" -c 'create table stock (item text primary key, taken bigint not null default 0)'
    STOCK_DATABASE_URL=postgres://... PULSAR_URL=pulsar://127.0.0.1:6650 \
        python3 inbox.py persistent://public/default/outbox.order

The work and the message id are committed in one transaction, by walpost.inbox_claim, and the broker is told afterwards. A process
that dies at any point loses nothing and takes nothing twice. An order that fails five times is set aside, whole and with the
reason, in walpost.inbox_poison; later ones go on, those of the same key too. SIGTERM ends it after the order in hand.
"""

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


def handle_once(connection, message):
    """True when the message is dealt with, for good: now, before, or by setting it aside."""
    message_id = message.properties()["id"]
    try:
        with connection.transaction():
            new = connection.execute("select walpost.inbox_claim(%s, %s)", (CONSUMER, message_id)).fetchone()[0]
            if new:
                take_stock(connection, message)
        return True
    except (psycopg.OperationalError, psycopg.InterfaceError):
        # Not the message's fault, and nobody knows whether it was committed: the next attempt finds out.
        raise
    except Exception as error:  # noqa: BLE001 - whatever the work raises is a failed attempt
        with connection.transaction():
            reason = f"{type(error).__name__}: {error}"
            attempts = connection.execute(
                "select walpost.inbox_failed(%s, %s, %s)", (CONSUMER, message_id, reason)
            ).fetchone()[0]
            if attempts < MAX_ATTEMPTS:
                return False
            connection.execute(
                "select walpost.inbox_give_up(%s, %s, %s, %s, %s, %s, %s, %s::jsonb)",
                (CONSUMER, message_id, reason, message.topic_name(), str(message.message_id()),
                 message.partition_key(), message.data(), json.dumps(message.properties())),
            )
        log.warning("message %s is set aside after %d attempts", message_id, attempts)
        return True


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
    while not stopping:
        try:
            message = consumer.receive(timeout_millis=POLL_MS)
        except pulsar.Timeout:
            continue
        pause, settled = 0.1, False
        # Tried again here, not by the broker: so the order is kept. What is not settled comes again to whoever consumes next.
        while not settled and not stopping:
            try:
                if connection is None or connection.closed:
                    connection = psycopg.connect(os.environ["STOCK_DATABASE_URL"], autocommit=True)
                settled = handle_once(connection, message)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                log.warning("the database is away: %s", error)
                connection = None
            if not settled:
                time.sleep(pause)
                pause = min(pause * 2, 30)
        if settled:
            consumer.acknowledge(message)
            log.info("settled %s", message.properties()["id"])
    client.close()


if __name__ == "__main__":
    main()
