# SPDX-License-Identifier: Apache-2.0
"""A trace as Perfetto's JSON: the format, exact times, names, what is missing."""

import io
from decimal import Decimal

import pytest
from pydantic import ValidationError

from fvdapi import tracing
from fvdapi.tracing import TraceEvent
from fvdctl.chrome_trace import ChromeTrace
from fvdtest.chrome_schema import read_chrome_trace

LONG_UP = 9_007_199_254_740_993  # ns: more than a float holds


def event(sequence, kind, what=0, *, begin=1000, end=2000, **more):
    values = {"offset": 0, "length": 0, "result": 0, "thread": 7, "role": 3, "source": 0} | more
    return TraceEvent(sequence=sequence, kind=kind, what=what, begin=begin, end=end, **values)


@pytest.fixture
def written(tmp_path):
    def write(*events, name="web", lost=0, is_whole=True):
        text = io.StringIO()
        made = ChromeTrace(text, name, {"pid": 41, "version": "1"})
        made.add(events)
        made.finish(lost=lost, is_whole=is_whole)
        path = tmp_path / "trace.json"
        path.write_text(text.getvalue())
        return read_chrome_trace(path)

    return write


def test_every_kind_has_its_place(written):
    file = written(
        event(0, tracing.REQUEST, 0, offset=4096, length=512, source=3, role=163, thread=8),
        event(1, tracing.REQUEST, 1, result=-28, thread=8, role=163),
        event(2, tracing.BASE, 2, offset=8192, length=4096),
        event(3, tracing.COMMIT, begin=2000, end=4000),
        event(4, tracing.FLUSH, begin=2500, end=3500),
        event(5, tracing.CHECKPOINT, begin=5000, end=5001),
        event(6, tracing.PREFETCH, 1, begin=6000, end=6000),
        event(7, tracing.COPY, begin=7000, end=7000),
    )
    shown = [(e.ph, e.name) for e in file.traceEvents]
    assert shown == [
        ("M", "process_name"),
        ("M", "thread_name"), ("b", "read"), ("e", "read"), ("b", "write"), ("e", "write"),
        ("M", "thread_name"), ("X", "base read: prefetch"), ("X", "commit"),
        ("X", "flush of the image"), ("X", "checkpoint"), ("X", "prefetch: hole"),
        ("X", "copy-on-read"),
    ]  # fmt: skip
    assert file.traceEvents[2].args == {"offset": 4096, "length": 512, "source": "image+base"}
    assert file.traceEvents[4].args["error"] == "ENOSPC"
    assert [e.args.name for e in file.traceEvents if e.ph == "M"] == [
        "fvd web", "connection 0", "crew 0",
    ]  # fmt: skip
    assert file.otherData == {
        "pid": 41, "version": "1", "device": "web", "lost_events": 0, "cut_off": False,
        "events": 8, "requests": 2,
    }  # fmt: skip


def test_times_are_exact_to_the_nanosecond(written):
    file = written(event(0, tracing.BASE, begin=LONG_UP, end=LONG_UP + 1))
    span = file.traceEvents[-1]
    assert (span.ts, span.dur) == (Decimal("9007199254740.993"), Decimal("0.001"))


def test_what_is_missing_is_said(written):
    file = written(lost=12, is_whole=False)
    assert (file.otherData["lost_events"], file.otherData["cut_off"]) == (12, True)


def test_names_and_numbers_that_nobody_knows_do_no_harm(written):
    name = 'a"b\\c\n\u2028</script>'
    file = written(event(0, tracing.REQUEST, 99), name=name)
    assert file.traceEvents[0].args.name == f"fvd {name}"
    assert file.traceEvents[2].name == "number 99"


def test_the_schema_notices_what_is_wrong(written, tmp_path):
    with pytest.raises(AssertionError, match="cross"):
        written(event(0, tracing.COMMIT, begin=0, end=10), event(1, tracing.FLUSH, begin=5, end=15))
    with pytest.raises(AssertionError, match="two requests"):
        written(event(0, tracing.REQUEST), event(0, tracing.REQUEST))
    with pytest.raises(ValidationError):
        written(event(0, 77))
