"""The C++ client with a schema: what it makes of a topic whose producer registered one, and bytes for such a topic.

Order: {"url", "do": "encode", "values": [{"id", "state"}, …]}
Answer: {"bytes"} for each value: Avro's binary encoding, in hexadecimal digits.

Order: {"url", "do": "read", "topic", "schema": "json|avro|string", "count": 3}
Answer: for each message {"value" (an object, or text), "version": the schema version it carries, or null}.
"""

from pulsar import ConsumerType, InitialPosition
from pulsar.schema import AvroSchema, Integer, JsonSchema, Record, String, StringSchema

from jsonlines import answer, connect, finish, order

# Far longer than a message takes.
PATIENCE_MS = 30_000


class Order(Record):
    id = Integer(required=True)
    state = String(required=True)


SCHEMAS = {"json": lambda: JsonSchema(Order), "avro": lambda: AvroSchema(Order), "string": StringSchema}


def encode(wanted):
    for value in wanted["values"]:
        answer(bytes=AvroSchema(Order).encode(Order(**value)).hex())


def read(client, wanted):
    consumer = client.subscribe(
        wanted["topic"],
        "typed",
        consumer_type=ConsumerType.Exclusive,
        schema=SCHEMAS[wanted["schema"]](),
        initial_position=InitialPosition.Earliest,
    )
    for _ in range(wanted["count"]):
        message = consumer.receive(timeout_millis=PATIENCE_MS)
        value = message.value()
        if isinstance(value, Order):
            value = {"id": value.id, "state": value.state}
        # Eight bytes, big-endian, which the binding hands out as text.
        version = message.schema_version().encode()
        answer(value=value, version=int.from_bytes(version, "big") if version else None)


def main():
    wanted = order()
    client = connect(wanted["url"])
    if wanted["do"] == "encode":
        encode(wanted)
    else:
        read(client, wanted)
    finish(client)


main()
