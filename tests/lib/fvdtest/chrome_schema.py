# SPDX-License-Identifier: Apache-2.0
"""What a trace file must look like: the Trace Event Format as strict models, and its rules.

The rules are those that viewers rely on: asynchronous spans end once and after they began, spans of
one thread lie beside or inside each other, each thread has a name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Time = Annotated[Decimal, Field(ge=0, decimal_places=3)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    pid: int
    tid: int


class NameOnly(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


class Metadata(Strict):
    ph: Literal["M"]
    name: Literal["process_name", "thread_name"]
    args: NameOnly


class Begin(Strict):
    ph: Literal["b"]
    cat: Literal["request"]
    name: str
    id: str
    ts: Time
    args: dict[str, int | str]


class End(Strict):
    ph: Literal["e"]
    cat: Literal["request"]
    name: str
    id: str
    ts: Time


class Complete(Strict):
    ph: Literal["X"]
    cat: Literal["base", "journal", "prefetch", "copy"]
    name: str
    ts: Time
    dur: Time
    args: dict[str, int | str]


class File(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    displayTimeUnit: Literal["ns"]  # noqa: N815
    traceEvents: list[  # noqa: N815
        Annotated[Metadata | Begin | End | Complete, Field(discriminator="ph")]
    ]
    otherData: dict[str, Any]  # noqa: N815


def read_chrome_trace(path: Path) -> File:
    """The file, if it keeps the format; ValidationError or AssertionError else."""
    # Decimals: a float would hide what the digits say.
    made = TypeAdapter(File).validate_python(json.loads(path.read_text(), parse_float=Decimal))
    _check_requests(made)
    _check_threads(made)
    return made


def _check_requests(file: File) -> None:
    begun: dict[str, Begin] = {}
    ended: set[str] = set()
    for event in file.traceEvents:
        if isinstance(event, Begin):
            assert event.id not in begun, f"two requests {event.id}"
            begun[event.id] = event
        elif isinstance(event, End):
            assert event.id not in ended, f"two ends of {event.id}"
            assert event.ts >= begun[event.id].ts, f"{event.id} ends before it begins"
            assert event.name == begun[event.id].name
            ended.add(event.id)
    assert ended == set(begun)


def _check_threads(file: File) -> None:
    named = {e.tid for e in file.traceEvents if isinstance(e, Metadata) and e.tid}
    spans: dict[int, list[tuple[Decimal, Decimal]]] = defaultdict(list)
    for event in file.traceEvents:
        if isinstance(event, Complete):
            spans[event.tid].append((event.ts, event.ts + event.dur))
    assert set(spans) <= named
    for of_thread in spans.values():
        around: list[Decimal] = []
        for begin, end in sorted(of_thread, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1], "spans of one thread cross each other"
            around.append(end)
