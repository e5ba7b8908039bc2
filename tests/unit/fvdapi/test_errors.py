# SPDX-License-Identifier: Apache-2.0
"""The table of error codes: well formed, and complete for what fvdd raises."""

import re
from pathlib import Path

import pytest

import fvdd
from fvdapi.errors import EXIT_FAILED, KINDS, ApiError, kind_of

_RAISED = re.compile(r"\b(?:ApiError|AttachError|WorkerError|Failure)\(\s*\"([a-z0-9_]+)\"")


def _sources() -> str:
    folders = [Path(next(iter(fvdd.__path__))), Path(next(iter(fvdd.__path__))).parent / "fvdapi"]
    return "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.code)
def test_row_is_well_formed(kind):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", kind.code)
    assert 400 <= kind.http_status < 600
    assert 1 <= kind.exit_status < 64
    assert kind.meaning


def test_every_raised_code_is_in_the_table():
    raised = set(_RAISED.findall(_sources()))
    assert len(raised) > 40
    assert "image_replaced" in raised, "what a worker raises crosses the wire, too"
    assert raised <= set(KINDS)


def test_unknown_code_gets_the_default_kind():
    kind = kind_of("some_engine_error")
    assert (kind.http_status, kind.exit_status) == (422, EXIT_FAILED)


def test_error_carries_what_the_user_needs():
    error = ApiError("device_busy", "it is busy", hint="wait", details={"pid": 7})
    assert str(error) == "it is busy"
    assert (error.http_status, error.exit_status) == (409, 5)
    assert error.details == {"pid": 7}
