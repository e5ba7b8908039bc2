# SPDX-License-Identifier: Apache-2.0
"""For the engine's unit tests: compiled probes, small images, waiting on conditions."""

import contextlib
import errno
import importlib.util
import os
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from fvdengine.header import MAGIC, Extension, Header
from fvdtest.images import make_image, open_image

NATIVE = Path(__file__).resolve().parents[2] / "native/build.py"
WAIT_SECONDS = 10.0
BLOCK = 4096
CHUNK = 4 * BLOCK
CHUNKS = 16
SIZE = CHUNKS * CHUNK
UNMAPPED = 0xFFFFFFFF


def load_builder():
    """tests/native/build.py as a module, whatever the import mode."""
    name = "fvd_native_build"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, NATIVE)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_collection_finish(session):
    """Compile before the first test, whose time limit does not allow for it."""
    if any("probes" in getattr(item, "fixturenames", ()) for item in session.items):
        builder = load_builder()
        with contextlib.suppress(builder.ProbeError):  # the fixture will tell
            builder.build()


@pytest.fixture(scope="session")
def probes():
    """The probe modules, compiled when they are out of date."""
    return load_builder().load()


@pytest.fixture(scope="session")
def wait_until():
    """Wait for a condition and return what it gave; fail when it never comes."""

    def wait(claim, what, seconds=WAIT_SECONDS):
        deadline = time.monotonic() + seconds
        while not (value := claim()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited {seconds} s in vain for {what}")
            time.sleep(0.001)  # the interval of polling, never the whole wait
        return value

    return wait


class Task(threading.Thread):
    """A call on a thread of its own; result() waits for it and raises what it raised."""

    def __init__(self, call, *arguments):
        super().__init__(daemon=True)
        self.call, self.arguments = call, arguments
        self.value = self.error = None
        self.start()

    def run(self):
        try:
            self.value = self.call(*self.arguments)
        except BaseException as error:  # told by result()
            self.error = error

    def result(self, seconds=WAIT_SECONDS):
        self.join(seconds)
        assert not self.is_alive(), "the call does not return"
        if self.error is not None:
            raise self.error
        return self.value


@pytest.fixture(scope="session")
def task():
    """Start a call on a thread: task(call, argument, ...).result()."""
    return Task


class Clone:
    """An image over a raw base in a folder of its own, opened with the engine on demand."""

    def __init__(self, folder, base, **options):
        self.folder = folder
        self.base_path = folder / "base.raw"
        self.path = folder / "clone.fvd"
        self.base_path.write_bytes(base)
        make_image(self.path, base=str(self.base_path), **options)
        self.opened = None

    def open(self, **engine):
        self.opened = open_image(self.path, **engine)
        return self.opened.device

    def close(self):
        if self.opened is not None:
            self.opened.close()
            self.opened = None


@pytest.fixture
def clone(tmp_path):
    """Make clones: clone(base bytes, **create options); what is still open is let go."""
    made = []

    def make(base, **options):
        folder = tmp_path / f"clone{len(made)}"
        folder.mkdir()
        made.append(Clone(folder, base, **options))
        return made[-1]

    yield make
    for one in made:
        if one.opened is not None:
            one.opened.abandon()


def descriptors():
    """How many are open, but for those of the machines that run beside the tests."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself is gone
            found += "fvd-uml" not in os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.fixture(autouse=True)
def nothing_left_over(wait_until):
    """No test leaves a native thread or a descriptor behind."""
    tasks = set(os.listdir("/proc/self/task"))
    files = descriptors()
    yield
    wait_until(lambda: set(os.listdir("/proc/self/task")) <= tasks, "all threads to end")
    # The machines' own thread may be starting a program at this very moment.
    wait_until(lambda: descriptors() <= files, "all descriptors to be closed")


def round_up(number, unit):
    return -(-number // unit) * unit


def small_header(*, blocks=64, block_size=4096, journal_pages=16, base_size=None, size=None,
                 table_pages=0, **changes):  # fmt: skip
    """A valid header of an image as small as can be: no gap between its parts. Compact where it has
    pages of a table."""
    base = blocks * block_size if base_size is None else base_size
    count = -(-base // block_size) if base else 0
    bitmap_size = round_up(-(-count // 8), 4096)
    journal_offset = 8192 + bitmap_size
    table_offset = journal_offset + journal_pages * 4096
    data_file = changes.get("data_file", "")
    values = {
        "magic": MAGIC, "header_size": 8192, "create_version": 2, "last_open_version": 2,
        "virtual_disk_size": base if size is None else size,
        "data_offset": 0 if data_file else table_offset + table_pages * 4096, "data_file": "",
        "data_file_fmt": "raw" if data_file else "",
        "base_img": "base.raw" if base else "", "base_img_fmt": "raw",
        "base_img_size": base, "bitmap_offset": 8192 if base else 0, "bitmap_size": bitmap_size,
        "block_size": block_size, "journal_offset": journal_offset if journal_pages else 0,
        "journal_size": journal_pages * 4096, "clean_shutdown": 1, "stable_journal_epoch": 1,
        "journal_buf_size": min(65536, journal_pages * 4096), "journal_clean_buf_period": 5000,
        "table_offset": table_offset if table_pages else 0, "table_size": table_pages * 4096,
        "chunk_size": 1 << 20, "storage_grow_unit": 1 << 20,
        "add_storage_cmd": "", "chunks_relocated": 0, "copy_on_read": 0,
        "max_outstanding_copy_on_read_data": 2_000_000, "prefetch_start_delay": -1,
        "base_img_fully_prefetched": 0 if base else 1, "num_prefetch_slots": 2,
        "bytes_per_prefetch": round_up(1 << 20, block_size),
        "prefetch_read_throughput_measure_time": 100,
        "prefetch_write_throughput_measure_time": 100, "prefetch_min_read_throughput": 5120,
        "prefetch_min_write_throughput": 5120, "prefetch_max_read_throughput": 10**9,
        "prefetch_max_write_throughput": 10**9, "prefetch_throttle_time": 30000,
        "need_zero_init": 0,
        "extension": Extension(bytes(range(16)), bytes(16), bytes(16), 0, 1, base, 0, bytes(32)),
    }  # fmt: skip
    return Header(**(values | changes))


@pytest.fixture(scope="session")
def header_of():
    """Make a header: header_of(blocks=..., journal_pages=..., any_field=...)."""
    return small_header


@pytest.fixture(scope="session")
def image_of():
    """Make the bytes of a whole image with such a header; bitmap, journal and data are zero, a
    table is unmapped and has no data behind it."""

    def make(**options):
        header = small_header(**options)
        if header.table_size:
            table = b"\xff" * header.table_size
            return header.pack().ljust(header.table_offset, b"\0") + table
        return header.pack().ljust(header.data_offset + header.virtual_disk_size, b"\0")

    return make


class Compact:
    """A compact image in memory, of 16 chunks of 4 blocks."""

    def __init__(self, probes, image_of, *, base=0, size=SIZE, unit=CHUNK, room=CHUNKS, grows=True,
                 places=0, data_file=False, gate=None, **options):  # fmt: skip
        """base: its blocks; room: places that storage may have; places: those it has, full of old
        content; unit: by which it grows."""
        options |= {"chunk_size": CHUNK, "storage_grow_unit": unit, "table_pages": 1}
        if data_file:
            options["data_file"] = "data.raw"
        content = image_of(blocks=base, size=size, **options)
        self.header = Header.unpack(content[:8192])
        old, most = b"\xaa" * (places * CHUNK), room * CHUNK
        self.probes = probes
        if data_file:
            self.store = probes.storage.Storage(content)
            self.data = probes.storage.Storage(old, most, grows)
        else:
            self.store = probes.storage.Storage(content + old, len(content) + most, grows)
            self.data = self.store
        self.base = probes.storage.Storage(b"b" * (base * BLOCK)) if base else None
        self.gate = gate
        self.image = None
        self.open()

    def open(self):
        data = None if self.data is self.store else self.data
        self.image = self.probes.image.Image(self.store, self.base, data=data, gate=self.gate)
        self.forget()

    def forget(self):
        self.store.forget()
        self.data.forget()

    def at(self, place):
        """Where a place lies in its store."""
        return self.header.data_offset + place * CHUNK

    def places(self):
        """Length of storage in places."""
        return (len(self.data.content()) - self.header.data_offset) / CHUNK

    def done(self, *kinds):
        """What was done to the image, with regions for offsets."""
        found = []
        for kind, offset, _, _ in self.store.log(*kinds):
            place = "data"
            if kind == "flush":
                place = ""
            elif offset < 8192:
                place = f"sector {offset // 512}"
            elif offset < self.header.journal_offset:
                place = "bitmap"
            elif offset < self.header.table_offset:
                place = "journal"
            elif offset < self.header.table_offset + self.header.table_size:
                place = "table"
            found.append(f"{kind} {place}".strip())
        return found

    def table(self):
        """Chunks with their places as the table on disk has them after a checkpoint."""
        assert self.image.checkpoint() == 0
        at = self.header.table_offset
        entries = struct.unpack("<16I", self.store.durable()[at : at + 64])
        return {chunk: entry for chunk, entry in enumerate(entries) if entry != UNMAPPED}

    def flush(self):
        """What one flush does."""
        self.forget()
        assert self.image.flush() == 0
        return self.done()

    def free_by_trim(self, chunk):
        """Take a chunk's place away and let it be free, with its old content in it."""
        assert self.image.trim(chunk * CHUNK, CHUNK) == 0
        self.data.fail("zero", errno.EOPNOTSUPP)
        assert self.image.checkpoint() == 0


@pytest.fixture
def compact(probes, image_of):
    """Make compact images: compact(base=..., places=..., any option of the header)."""
    made = []

    def make(**options):
        made.append(Compact(probes, image_of, **options))
        return made[-1]

    yield make
    for one in made:
        one.image.free()
