# SPDX-License-Identifier: Apache-2.0
"""Images in any state, written byte by byte with the Python codec: for checks and repairs.

Nothing is validated here: a forged image may be as wrong as a test needs it.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fvdengine import geometry
from fvdengine.content import load_content
from fvdengine.create import create_image
from fvdengine.editing import ImageFile
from fvdengine.header import Header
from fvdengine.metadata import pack_table
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions
from fvdengine.records import Record, Trailer, seal_sector
from fvdengine.units import PAGE, SECTOR, round_up

BLOCK = 4096
CHUNK = 16384
JOURNAL = 65536


@dataclass(frozen=True)
class Forged:
    """What to forge. `places` maps chunks to places and makes the image compact.

    `local` are the blocks whose bit is set; storage is filled with random bytes wherever it is
    mapped or, in raw layout, where `filled` says so. `file_places` is the file's length in places.
    """

    size: int = 1 << 18
    base: Path | None = None
    places: Mapping[int, int] | None = None
    local: Iterable[int] = ()
    filled: Iterable[int] = ()
    data_file: str = ""
    file_places: int | None = None
    values: Mapping[str, object] = field(default_factory=dict)


def forge_image(path: Path, what: Forged) -> Header:
    """Write the image at `path`, and its data file beside it; return its header."""
    options = CreateOptions(
        size=what.size,
        base=str(what.base) if what.base else None,
        block_size=BLOCK if what.base else None,
        journal_size=JOURNAL if what.base else None,
    )
    header = create_image(path, options).header
    if what.places is not None or what.data_file:
        header = _laid_out(header, what)
    header = replace(header, **what.values)  # type: ignore[arg-type]
    store = path.parent / what.data_file if what.data_file else path
    rng = random.Random(5)
    with path.open("r+b") as image, store.open("r+b" if store == path else "w+b") as data:
        for at in (0, 8192):
            image.seek(at)
            image.write(header.pack())
        image.truncate(_image_length(header, what))
        if what.data_file:
            data.truncate(_data_length(header, what))
        bitmap = bytearray(header.bitmap_size)
        for block in what.local:
            bitmap[block // 8] |= 1 << block % 8
        image.seek(header.bitmap_offset or PAGE)
        image.write(bitmap)
        for place in sorted((what.places or {}).values()):
            data.seek(geometry.place_offset(header, place))
            data.write(rng.randbytes(header.chunk_size))
        for block in what.filled:
            data.seek(header.data_offset + block * BLOCK)
            data.write(rng.randbytes(BLOCK))
        if what.places is not None:
            image.seek(header.table_offset)
            image.write(table_of(header, what.places))
    return header


def table_of(header: Header, places: Mapping[int, int]) -> bytes:
    """Return the bytes of the table section with these places."""
    count = geometry.chunk_count(header.virtual_disk_size, header.chunk_size)
    entries = [places.get(index, geometry.UNMAPPED) for index in range(count)]
    return pack_table(entries, header.table_size)


def _laid_out(header: Header, what: Forged) -> Header:
    """Give a header of raw layout a journal and a table, or a data file."""
    end = header.bitmap_offset + header.bitmap_size or header.header_size
    values: dict[str, int | str] = {"journal_offset": end, "journal_size": JOURNAL}
    end += JOURNAL
    if what.places is not None:
        values |= {
            "table_offset": end,
            "table_size": round_up(geometry.table_bytes(what.size, CHUNK), PAGE),
            "chunk_size": CHUNK,
        }
    if what.data_file:
        values |= {"data_file": what.data_file, "data_file_fmt": "raw", "data_offset": 0}
    return replace(header, journal_buf_size=4096, **values)  # type: ignore[arg-type]


def _image_length(header: Header, what: Forged) -> int:
    length = geometry.required_length(header)
    if what.places is None or what.data_file:
        return length
    return max(length, geometry.place_offset(header, _place_count(what)))


def _data_length(header: Header, what: Forged) -> int:
    if what.places is None:
        return header.virtual_disk_size
    return _place_count(what) * header.chunk_size


def _place_count(what: Forged) -> int:
    if what.file_places is not None:
        return what.file_places
    return max((what.places or {}).values(), default=-1) + 1


def put_records(
    path: Path, header: Header, position: int, records: Iterable[Record], *,
    epoch: int = 1, sequence: int = 1,
) -> None:  # fmt: skip
    """Write a sealed journal sector at `position`, counted in sectors."""
    assert header.extension is not None
    with path.open("r+b") as image:
        image.seek(header.journal_offset + position * SECTOR)
        image.write(
            seal_sector(records, Trailer(epoch, sequence), header.extension.image_uuid)
        )


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def header_of(path: Path) -> Header:
    """Return the header of the image, not validated."""
    with path.open("rb") as file:
        return Header.unpack(file.read(8192))


def disk_bytes(path: Path, **options: object) -> bytes:
    """Return all that the disk shows, as the files alone say."""
    values = {"read_only": True, "accept_changed_base": True} | options
    with open_plan(path, OpenOptions(**values)) as plan:  # type: ignore[arg-type]
        return load_content(plan.layers).read(0, plan.header.virtual_disk_size)


# Crashes -----------------------------------------------------------------------------------

Step = tuple[str, int, bytes | int]


class Recorder(ImageFile):
    """Does what it is told and notes it in `steps`, which may be shared by several files."""

    def __init__(self, fd: int, path: str, steps: list[tuple[str, Step]]) -> None:
        super().__init__(fd, path)
        self._steps = steps

    def _note(self, what: str, offset: int = 0, value: bytes | int = 0) -> None:
        self._steps.append((self.path, (what, offset, value)))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        super().write(offset, data)
        self._note("write", offset, bytes(data))

    def zero(self, offset: int, length: int) -> None:
        super().zero(offset, length)
        if offset < (end := min(offset + length, self.length())):
            self._note("write", offset, bytes(end - offset))

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self._note("truncate", length)

    def flush(self) -> None:
        super().flush()
        self._note("flush")


def crashes(
    before: Mapping[str, bytes], steps: list[tuple[str, Step]], rng: random.Random
) -> Iterable[dict[str, bytes]]:
    """Yield what the files may hold after a crash at any point.

    All that was flushed is there; of the sectors written since to a file, any may be.
    """
    durable = {path: bytearray(data) for path, data in before.items()}
    waiting: list[tuple[str, Step]] = []
    for path, step in steps:
        if step[0] == "flush":
            yield _with(durable, waiting, lambda _: True)
            yield _with(durable, waiting, lambda _: rng.random() < 0.5)
            for other, done in waiting:
                if other == path:
                    _apply(durable, other, done)
            waiting = [item for item in waiting if item[0] != path]
        else:
            waiting += [(path, piece) for piece in _sectors(step)]
            yield _with(durable, waiting, lambda _: rng.random() < 0.5)
    yield _with(durable, waiting, lambda _: True)


def every_crash(
    before: Mapping[str, bytes], steps: list[tuple[str, Step]], most: int = 5
) -> Iterable[dict[str, bytes]]:
    """Yield each state once that a crash may leave: after every step, with any of the sectors that
    were not flushed; where more than `most` of them change something, the first and last of them.
    """
    durable = {path: bytearray(data) for path, data in before.items()}
    waiting: list[tuple[str, Step]] = []
    seen: set[bytes] = set()
    for path, step in [*steps, ("", ("flush", 0, 0))]:
        if step[0] == "flush":
            for other, done in waiting:
                if other == path:
                    _apply(durable, other, done)
            waiting = [item for item in waiting if item[0] != path]
        else:
            waiting += [(path, piece) for piece in _sectors(step)]
        felt = [item for item in waiting if _changes(durable, *item)]
        if len(felt) > most:
            felt = [*felt[: most // 2], *felt[-(most - most // 2) :]]
        for chosen in range(1 << len(felt)):
            picked = [item for at, item in enumerate(felt) if chosen >> at & 1]
            state = _with(durable, picked, lambda _: True)
            name = hashlib.sha256(b"".join(state.values())).digest()
            if name not in seen:
                seen.add(name)
                yield state


def _changes(files: Mapping[str, bytearray], path: str, step: Step) -> bool:
    what, offset, value = step
    if what == "truncate":
        return offset != len(files[path])
    assert isinstance(value, bytes)
    return files[path][offset : offset + len(value)] != value


def _sectors(step: Step) -> Iterable[Step]:
    what, offset, value = step
    if what != "write" or not isinstance(value, bytes):
        return [step]
    cuts = [offset, *range(offset - offset % SECTOR + SECTOR, offset + len(value), SECTOR)]
    ends = [*cuts[1:], offset + len(value)]
    return [
        ("write", low, value[low - offset : high - offset])
        for low, high in zip(cuts, ends, strict=True)
    ]


def _with(
    durable: Mapping[str, bytearray], waiting: list[tuple[str, Step]],
    chosen: Callable[[Step], bool],
) -> dict[str, bytes]:  # fmt: skip
    files = {path: bytearray(data) for path, data in durable.items()}
    for path, step in waiting:
        if chosen(step):
            _apply(files, path, step)
    return {path: bytes(data) for path, data in files.items()}


def _apply(files: Mapping[str, bytearray], path: str, step: Step) -> None:
    what, offset, value = step
    data = files[path]
    if what == "truncate":
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif isinstance(value, bytes):
        data.extend(bytes(max(0, offset + len(value) - len(data))))
        data[offset : offset + len(value)] = value
