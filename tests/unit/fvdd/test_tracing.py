# SPDX-License-Identifier: Apache-2.0
"""Emptying a trace into a pipe: its end, readers that leave or stall, an image that is closed."""

import os
import threading

import pytest

from fvdapi import tracing as stream
from fvdapi.tracing import EVENT, TraceEvent, TraceReader
from fvdd.worker import tracing

EVENTS = [TraceEvent(n, n, n, 0, 0, 0, 0, 0, 1, 0, 0) for n in range(5)]


class Engine:
    """Gives its events once; `closed` is an image that is closed meanwhile."""

    def __init__(self, events=(), *, endless=False, closed=False):
        self.events, self.endless, self.closed = list(events), endless, closed
        self.stopped = False

    def trace_take(self):
        if self.closed:
            raise ValueError("the device is closed")
        given = self.events
        if not self.endless:
            self.events = []
        return b"".join(EVENT.pack(*event) for event in given), 2

    def trace_stop(self):
        if self.closed:
            raise ValueError("the device is closed")
        self.stopped = True


@pytest.fixture
def traced():
    """Run a trace of an engine on a thread: (reading end of the pipe, thread)."""
    running = []

    def run(engine, seconds):
        ours, theirs = os.pipe()
        words = (engine, theirs, seconds, {"a": 1})
        thread = threading.Thread(target=tracing.run_trace, args=words)
        thread.start()
        file = os.fdopen(ours, "rb")
        running.append((file, thread))
        return file, thread

    yield run
    for file, thread in running:
        file.close()
        thread.join(20)
        assert not thread.is_alive()


def chunks(file):
    return iter(lambda: os.read(file.fileno(), 4096), b"")


def test_both_sides_spell_the_stream_alike():
    assert (stream.END, EVENT.size) == (tracing.END, tracing.EVENT_BYTES)
    assert tracing.FRAME.format == stream.FRAME.format


def test_all_events_then_the_end(traced):
    engine = Engine(EVENTS)
    file, _ = traced(engine, 0.05)
    reader = TraceReader(chunks(file))
    assert reader.about["a"] == 1
    assert [event for frame in reader.frames() for event in frame] == EVENTS
    assert (reader.lost, reader.is_whole) == (2, True)
    assert engine.stopped


def test_an_image_that_is_closed_cuts_it_off(traced):
    file, _ = traced(Engine(closed=True), 60)
    reader = TraceReader(chunks(file))
    assert list(reader.frames()) == []
    assert not reader.is_whole


def test_a_reader_that_leaves_ends_it(traced):
    engine = Engine(EVENTS)
    file, thread = traced(engine, 60)
    file.read(1)
    file.close()
    thread.join(20)
    assert engine.stopped


def test_a_reader_that_takes_nothing_is_given_up(traced, monkeypatch):
    monkeypatch.setattr(tracing, "STALLED_SECONDS", 0.05)
    engine = Engine(EVENTS * 2000, endless=True)
    _, thread = traced(engine, 60)
    thread.join(20)
    assert not thread.is_alive()
    assert engine.stopped
