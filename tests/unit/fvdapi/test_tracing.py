# SPDX-License-Identifier: Apache-2.0
"""The stream of a trace: read in chunks of any size, cut off anywhere, or not a trace at all."""

import json

import pytest

from fvdapi.errors import ApiError
from fvdapi.tracing import END, EVENT, FRAME, TraceEvent, TraceReader, role_name

EVENTS = [TraceEvent(n, 10 * n, 10 * n + 5, 4096 * n, 512, n % 7, 0, -5, 77, 3, 0)
          for n in range(20)]
HEAD = json.dumps({"fvd_trace": 1, "pid": 9}).encode() + b"\n"


def frame(events, lost=0):
    data = b"".join(EVENT.pack(*event) for event in events)
    return FRAME.pack(len(data), 0, lost) + data


STREAM = HEAD + frame(EVENTS[:7]) + frame([]) + frame(EVENTS[7:], 3) + FRAME.pack(END, 0, 4)


@pytest.mark.parametrize("size", [1, 7, 63, 1 << 20])
def test_chunks_of_any_size(size):
    reader = TraceReader(STREAM[at : at + size] for at in range(0, len(STREAM), size))
    assert reader.about["pid"] == 9
    assert [event for frame in reader.frames() for event in frame] == EVENTS
    assert (reader.lost, reader.is_whole) == (4, True)


@pytest.mark.parametrize("cut", [1, 16, 17, 100, 500])
def test_a_stream_that_is_cut_off_says_so(cut):
    reader = TraceReader([STREAM[:-cut]])
    got = [event for frame in reader.frames() for event in frame]
    assert got == EVENTS[: len(got)]
    assert not reader.is_whole


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"no line",
        b"x" * 100000,
        b"[]\n",
        b'{"fvd_trace": 2}\n',
        b"\xff\xff\n",
        HEAD + FRAME.pack(63, 0, 0) + bytes(63),
        HEAD + FRAME.pack(1 << 30, 0, 0),
    ],
)
def test_what_is_no_trace_is_refused(stream):
    with pytest.raises(ApiError, match="makes no sense"):
        list(TraceReader(iter([stream, b""])).frames())


def test_roles_by_their_block():
    assert [role_name(n) for n in (0, 1, 2, 3, 162, 163, 226)] == [
        "control", "keeper", "prefetch", "crew 0", "crew 159", "connection 0", "connection 63",
    ]  # fmt: skip
