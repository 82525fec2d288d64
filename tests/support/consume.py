"""Consumers of the C++ client on one subscription; a line for each message, until the input is closed.

Order: {"url", "topic" (one or a list), "type": "Exclusive|Shared|KeyShared", "consumers": 4, "sticky": false}
Answer: {"ready": true} when all consumers are subscribed; then for each message {"consumer", "key", "payload" (hexadecimal),
"properties", "received_ms", "ledger", "entry", "topic"}.
"""

import threading
import time

import pulsar

from jsonlines import answer, connect, finish, order

# A Key_Shared subscription hashes a key to one of these.
HASH_RANGE = 65536
# How long a receiver waits before it looks whether it is to stop.
PATIENCE_MS = 100


def report(number, message):
    place = message.message_id()
    answer(
        consumer=number,
        key=message.partition_key(),
        payload=message.data().hex(),
        properties=message.properties(),
        received_ms=time.time() * 1000,
        ledger=place.ledger_id(),
        entry=place.entry_id(),
        topic=message.topic_name(),
    )


def receive(number, consumer, stop):
    while not stop.is_set():
        try:
            message = consumer.receive(timeout_millis=PATIENCE_MS)
        except pulsar.Timeout:
            continue
        report(number, message)
        consumer.acknowledge(message)


def subscribe(client, wanted, number):
    policy = None
    if wanted.get("sticky"):
        share = HASH_RANGE // wanted["consumers"]
        policy = pulsar.ConsumerKeySharedPolicy(
            key_shared_mode=pulsar.KeySharedMode.Sticky,
            sticky_ranges=[(number * share, (number + 1) * share - 1)],
        )
    return client.subscribe(
        wanted["topic"],
        "judge",
        consumer_type=getattr(pulsar.ConsumerType, wanted["type"]),
        # The broker spreads keys by the consumers' names, so these make every run alike.
        consumer_name=f"consumer-{number}",
        initial_position=pulsar.InitialPosition.Earliest,
        key_shared_policy=policy,
    )


def main():
    wanted = order()
    client = connect(wanted["url"])
    consumers = [subscribe(client, wanted, number) for number in range(wanted.get("consumers", 1))]
    answer(ready=True)
    stop = threading.Event()
    threads = [
        threading.Thread(target=receive, args=(number, consumer, stop))
        for number, consumer in enumerate(consumers)
    ]
    for thread in threads:
        thread.start()
    while order() is not None:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    finish(client)


main()
