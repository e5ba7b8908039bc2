# SPDX-License-Identifier: Apache-2.0
"""Log lines: one line an event whatever the values hold; repeats held back and counted."""

import io
import logging

import pytest

from fvdd import log


def _record(message: str, level: int = logging.INFO, **values: object) -> logging.LogRecord:
    record = logging.LogRecord("fvdd.test", level, "", 0, message, None, None)
    record.__dict__.update(log.fields(**values))
    return record


def test_line_is_key_value():
    line = log.KeyValueFormatter(with_time=False).format(
        _record("device state", name="web", device="/dev/nbd0")
    )
    assert line == 'level=info logger=fvdd.test message="device state" name=web device=/dev/nbd0'


def test_every_line_of_a_worker_names_its_device(monkeypatch):
    monkeypatch.setattr(log, "_about", {})
    log.about(name="web")
    shown = log.KeyValueFormatter(with_time=False)
    assert shown.format(_record("event", event="parked")).endswith("name=web event=parked")
    assert shown.format(_record("event", name="db")).endswith("message=event name=db")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("two\nlines", '"two\\x0alines"'),
        ("", '""'),
        (7, "7"),
        ("k=v", '"k=v"'),
    ],
)
def test_values_cannot_break_the_line(value, text):
    assert log.quote(value) == text


def test_repeats_are_held_back_and_counted():
    now = [0.0]
    repeat = log.RepeatFilter(clock=lambda: now[0])

    def complaint(name: str = "web") -> logging.LogRecord:
        return _record("the base is gone", logging.WARNING, name=name)

    passed = [repeat.filter(complaint()) for _ in range(100)]
    assert sum(passed) == log.REPEAT_MAX
    assert repeat.filter(complaint("another device"))
    assert repeat.filter(_record("something else", logging.WARNING))
    now[0] = log.REPEAT_WINDOW_SECONDS
    later = complaint()
    assert repeat.filter(later)
    assert "90 times more" in later.getMessage()


def test_what_was_done_is_always_written():
    repeat = log.RepeatFilter(clock=lambda: 0.0)
    assert all(repeat.filter(_record("request", action="attach")) for _ in range(100))


def test_setup_writes_to_the_stream(monkeypatch):
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    try:
        log.setup("info", stream)
        logging.getLogger("fvdd.x").info("hello", extra=log.fields(a=1))
        logging.getLogger("fvdd.x").debug("not shown")
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
    assert stream.getvalue().count("\n") == 1
    assert "message=hello a=1" in stream.getvalue()
