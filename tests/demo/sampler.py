#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Keep what addresses of metrics say, each second, until it is told to end: a line of JSON each.

`make run` works where a Prometheus may not be reachable (a machine of User Mode Linux has no
network), so what it would have scraped is kept, and given to one afterwards: see panels.py.
"""

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
import urllib.request

PERIOD_SECONDS = 1.0
ANSWER_SECONDS = 20


def sample(target: str) -> str:
    """One line: what the address says now; no text when it does not answer."""
    job, _, address = target.partition("=")
    found = {"time": time.time(), "job": job, "instance": address, "text": None}
    with contextlib.suppress(OSError):
        url = f"http://{address}/metrics"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            found["text"] = answer.read().decode()
    return json.dumps(found) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("targets", nargs="+", metavar="JOB=HOST:PORT")
    arguments = parser.parse_args()
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ending.set())
    with open(arguments.file, "w", encoding="utf-8") as file:
        while not ending.wait(PERIOD_SECONDS):
            file.writelines(map(sample, arguments.targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
