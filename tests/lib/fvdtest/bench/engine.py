# SPDX-License-Identifier: Apache-2.0
"""What the format itself costs: local reads and writes of 4 KiB by the engine, in one thread and
without a socket, beside preadv2 and pwritev2 of a raw file at the same places."""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fvdtest import tree
from fvdtest.bench.figures import Row
from fvdtest.bench.limits import against_limit
from fvdtest.bench.stand import Stand, StandError
from fvdtest.images import make_image

MIB = 1 << 20
BUILDER = tree.ROOT / "tests/native/build.py"
COST_MAX = 1.1  # of what a raw file costs
ROUNDS = 5


def probes() -> SimpleNamespace:
    """The engine's C functions as tests see them, compiled where that is needed."""
    spec = importlib.util.spec_from_file_location("fvd_native_build", BUILDER)
    assert spec is not None
    assert spec.loader is not None
    builder: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    try:
        found: SimpleNamespace = builder.load()
    except builder.ProbeError as error:
        raise StandError(str(error)) from error
    return found


def filled(folder: Path, size: int, native: SimpleNamespace, clone: bool) -> Any:
    """An open image of which the first `size` bytes are local; a clone keeps its bitmap."""
    name = "clone" if clone else "compact"
    path, base = folder / f"{name}.fvd", folder / "base.raw"
    if clone:
        with base.open("wb") as file:
            file.truncate(size + MIB)
    whence = {"base": str(base)} if clone else {"size": size + MIB}
    make_image(path, compact=not clone, **whence)
    with path.open("r+b") as file, base.open("rb") if clone else path.open("rb") as below:
        under = native.storage.FileStorage(below.fileno()) if clone else None
        image = native.image.Image(file.fileno(), under)
    piece = os.urandom(MIB)
    for offset in range(0, size, MIB):
        if image.write(offset, piece):
            raise StandError(f"{path} cannot be written")
    return image


def ratio(image: Any, raw: int, size: int, calls: int, writes: bool) -> float:
    """Processor time of the image over that of the raw file: the median of rounds."""
    found: list[float] = []
    for _ in range(ROUNDS):
        ours, theirs = image.timed(raw, size, calls, writes)
        if ours is None:
            raise StandError("a read or write failed")
        found.append(int(ours) / int(theirs))
    return statistics.median(found)


def engine(stand: Stand, quick: bool) -> list[Row]:
    """Rows of both kinds of images, reads and writes."""
    native = probes()
    size, calls = (32 * MIB, 4000) if quick else (256 * MIB, 50_000)
    rows = []
    with tempfile.TemporaryDirectory(dir=stand.directory) as name:
        folder = Path(name)
        with (folder / "raw").open("w+b") as raw:
            for _ in range(0, size, MIB):
                raw.write(os.urandom(MIB))
            raw.flush()
            for clone in (False, True):
                image = filled(folder, size, native, clone)
                kind = "clone" if clone else "compact"
                for writes in (False, True):
                    cost = ratio(image, raw.fileno(), size, calls, writes)
                    job = f"engine-{kind}-{'write' if writes else 'read'}"
                    rows.append(against_limit(job, cost, COST_MAX, "x"))
                image.free()
    return rows
