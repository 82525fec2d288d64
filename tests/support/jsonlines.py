"""What the programs beside it share: orders come in as lines of JSON, answers go out as lines of JSON.

Standard output belongs to the answers alone; what the client library prints there by itself goes to standard error.
"""

import json
import os
import sys
import threading

import pulsar

_answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
os.dup2(2, 1)
_lock = threading.Lock()


def _fail(failure):
    threading.__excepthook__(failure)
    sys.stderr.flush()
    os._exit(1)


# A thread that fails must not leave a program that waits for ever.
threading.excepthook = _fail


def order():
    """The next line of input, or None at its end."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def answer(**fields):
    """Writes one line; safe from any thread."""
    line = json.dumps(fields) + "\n"
    with _lock:
        _answers.write(line)


def connect(url):
    """A client that says only what goes wrong."""
    return pulsar.Client(url, logger=pulsar.ConsoleLogger(pulsar.LoggerLevel.Warn))


def finish(client):
    """Closes the client and ends the process; a thread of the library that still runs does not hold it up."""
    client.close()
    sys.stderr.flush()
    os._exit(0)
