# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a disk are: samples of equal cells, at constant cost whatever its size; or all
extents, a part at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from fvdd.worker.channel import Message

SAMPLES: Final = 8
CELLS_MAX: Final = 512
SECTOR: Final = 512
# A base far away may have to be asked; a picture is not worth more.
LIMIT_SECONDS: Final = 1.0

# Of all extents: so much is looked at at once, and so many fit into an answer.
STEP: Final = 1 << 28
EXTENTS_MAX: Final = 2000

_KINDS: Final = {"data": "local", "base": "base", "zero": "zero", "base-zero": "zero"}


class Disk(Protocol):
    """The part of the engine that is looked at."""

    @property
    def size(self) -> int: ...
    def block_status(self, offset: int, length: int) -> list[tuple[int, str]]: ...


def sample_map(disk: Disk, cells: int, clock: Callable[[], float] = time.monotonic) -> Message:
    """Of each cell, how many samples were found local, in the base, or zero. Blocks."""
    found = {kind: [0] * cells for kind in ("local", "base", "zero")}
    deadline = clock() + LIMIT_SECONDS
    size = disk.size
    for cell in range(cells):
        if clock() >= deadline:
            break
        for sample in range(SAMPLES):
            offset = size * (cell * SAMPLES + sample) // (cells * SAMPLES) // SECTOR * SECTOR
            if offset < size:
                (_, kind), *_ = disk.block_status(offset, min(SECTOR, size - offset))
                found[_KINDS[kind]][cell] += 1
    return {"size": size, **found}


def list_extents(
    disk: Disk, offset: int, clock: Callable[[], float] = time.monotonic
) -> Message:
    """The extents from `offset` on, as (length, kind), and where to go on: at the disk's end None.
    Blocks, for about LIMIT_SECONDS."""
    found: list[list[object]] = []
    deadline, size, at = clock() + LIMIT_SECONDS, disk.size, offset
    while at < size and len(found) < EXTENTS_MAX and (at == offset or clock() < deadline):
        for length, kind in disk.block_status(at, min(STEP, size - at)):
            if len(found) == EXTENTS_MAX:
                break
            found.append([length, kind])
            at += length
    return {"size": size, "extents": found, "next": at if at < size else None}
