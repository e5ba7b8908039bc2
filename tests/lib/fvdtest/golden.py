# SPDX-License-Identifier: Apache-2.0
"""The golden images of tests/fixtures/golden: unpack one, and what it must contain.

An image was written byte by byte by tests/fixtures/make_golden.py, without the engine and without
the code that reads images; index.json beside the images says what each must show.
"""

import json
import lzma
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[2] / "fixtures" / "golden"
BASE_TIME_NS = 10**18  # of every raw base: images know their base by it
SECTOR = 512
PAGE = 4096

Run = tuple[int, int, str, int]


def stamp(kind: str, sector: int) -> bytes:
    """The 512 bytes that tell from which sector of the disk they are: b base, d data, x stale."""
    return b"%s%06d\n" % (kind.encode(), sector) * 64


@dataclass(frozen=True)
class Golden:
    """An unpacked image. `runs` are (start, length, source, offset) and cover the whole disk.

    source is "data" (offset in the storage of the top layer), "zero" or "base" (offset -1).
    `refused` is the code of the error that opening must end with, "" if it must succeed.
    """

    name: str
    about: str
    path: Path
    size: int
    runs: tuple[Run, ...]
    refused: str

    def content(self) -> bytes:
        """Every byte that the disk must show (not of chain-of-two, whose base is an image)."""
        found = bytearray()
        for start, length, source, _ in self.runs:
            assert start == len(found)
            for sector in range(start // SECTOR, (start + length) // SECTOR):
                if source == "zero":
                    found += bytes(SECTOR)
                else:
                    found += stamp(source[0], sector)
        # A base that ends inside a sector shows zeros behind its end.
        if (end := self._facts().get("base_end")) is not None:
            first = -(-end // SECTOR) * SECTOR
            found[end:first] = bytes(first - end)
        return bytes(found)

    def _facts(self) -> dict[str, int]:
        facts: dict[str, int] = index()[self.name]["facts"]
        return facts


@cache
def index() -> dict[str, Any]:
    """What index.json says about each image, by name."""
    found: dict[str, Any] = json.loads((DIRECTORY / "index.json").read_text())
    return found


def names(*, refused: bool | None = None) -> list[str]:
    """The names of all images, or of those that must (not) be refused."""
    return [
        name for name, entry in index().items()
        if refused is None or bool(entry["refused"]) is refused
    ]  # fmt: skip


def unpack(name: str, directory: Path) -> Golden:
    """Write the files of an image into `directory`, sparse, and return what it must show."""
    entry = index()[name]
    for file_name in entry["files"]:
        write_sparse(directory / file_name, packed(file_name))
    return Golden(
        name, entry["about"], directory / entry["files"][0], entry["size"],
        tuple((start, length, source, offset) for start, length, source, offset in entry["runs"]),
        entry["refused"],
    )  # fmt: skip


def packed(file_name: str) -> bytes:
    """The bytes of a stored file."""
    return lzma.decompress((DIRECTORY / f"{file_name}.xz").read_bytes())


def write_sparse(path: Path, data: bytes) -> None:
    """Write a file whose pages of zeros are holes."""
    with path.open("wb") as file:
        for at in range(0, len(data), PAGE):
            if data[at : at + PAGE].strip(b"\0"):
                file.seek(at)
                file.write(data[at : at + PAGE])
        file.truncate(len(data))
    if path.suffix == ".raw":
        os.utime(path, ns=(BASE_TIME_NS, BASE_TIME_NS))
