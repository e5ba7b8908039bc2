# SPDX-License-Identifier: Apache-2.0
"""A failed request is one line in fvdd's log, with errno, operation, place, file; and an event."""

import json
import logging
import os

import pytest

from fvdd.log import KeyValueFormatter, RepeatFilter
from fvdtest.daemon import wait_until

MIB = 1 << 20


@pytest.fixture
def lines():
    """What fvdd writes about devices, as it would write it."""
    found = []

    class Kept(logging.Handler):
        def emit(self, record):
            found.append(KeyValueFormatter(with_time=False).format(record))

    handler = Kept(logging.WARNING)
    handler.addFilter(RepeatFilter())
    logging.getLogger("fvdd").addHandler(handler)
    yield found
    logging.getLogger("fvdd").removeHandler(handler)


def test_a_failed_request_is_one_line_that_says_all(daemon, clone, base, lines):
    disk = daemon.attach(clone()[0], "--wait", "node")
    os.truncate(base, 4096)
    with pytest.raises(OSError, match="answered with an error"):
        disk.read(2 * MIB, 512)
    wait_until(lambda: [line for line in lines if "a request failed" in line], "the line")
    (line,) = [line for line in lines if "EIO" in line]
    for part in (
        "level=error", "name=web", "operation=read", "offset=2097152", "length=512",
        "error=EIO", "errno=5", f"file={base}",
    ):  # fmt: skip
        assert part in line
    past = daemon.ctl("events", "--past", "--json", "--count", "4").stdout.splitlines()
    events = [json.loads(one) for one in past]
    (event,) = [one for one in events if one["message"] == "a request failed"]
    assert (event["level"], event["values"]["operation"]) == ("error", "read")


def test_a_base_that_keeps_failing_does_not_fill_the_log(daemon, clone, base, lines):
    disk = daemon.attach(clone()[0], "--wait", "node")
    os.truncate(base, 0)
    for number in range(30):
        with pytest.raises(OSError, match="answered with an error"):
            disk.read(number * 4096, 512)
    wait_until(lambda: len(lines) >= 10, "the first lines")
    disk.write(4 * MIB, b"w" * 65536)
    assert len([line for line in lines if "a request failed" in line]) == 10
