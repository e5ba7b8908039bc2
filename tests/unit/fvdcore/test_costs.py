# SPDX-License-Identifier: Apache-2.0
"""What the engine promises to cost: time and memory of an open, bytes and flushes of metadata."""

import contextlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fvdengine.records import BitmapRecord, Trailer, seal_sector
from fvdtest.forge import header_of, poke
from fvdtest.images import make_image, open_image

TIB = 1 << 40
MIB = 1 << 20
BLOCK = 4096
BUSY = 5  # a machine that does much else may take so many times as long

OPENING = """
import resource, sys, time
from fvdengine.opening import OpenOptions, open_device, open_plan
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
times, busy = [], []
for turn in range(3):
    with open_plan(sys.argv[1], OpenOptions(allow_dirs=(sys.argv[2],))) as plan:
        before, begin, used = resident(), time.perf_counter(), time.process_time()
        device = open_device(plan)
        times.append(time.perf_counter() - begin)
        busy.append(time.process_time() - used)
        grown = resident() - before
        device.close()
print(f"{min(times):.3f} s, {min(busy):.3f} s of processors, {grown / 2**20:.1f} MiB")
"""


def holds(folder, size):
    """Whether a sparse file there may be so long."""
    probe = folder / "probe"
    with probe.open("wb") as file, contextlib.suppress(OSError):
        file.truncate(size)
    found = probe.stat().st_size == size
    probe.unlink()
    return found


@pytest.fixture
def vast(tmp_path):
    """A folder for files of 16 TiB: on tmpfs where the file system of the tests has no such."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield tmp_path if holds(tmp_path, 17 * TIB) else Path(folder)


@pytest.fixture
def slots(probes):
    """Where the stats page keeps what."""
    return probes.plain.slots()


def test_sixteen_tebibytes_open_at_once_and_in_their_metadata_s_memory(vast):
    """Bitmap, table and their copies may become resident; nothing else of that size."""
    base = vast / "base.raw"
    with base.open("wb") as file:
        file.truncate(16 * TIB - BLOCK)
    image = make_image(vast / "vast.fvd", base=str(base), size=16 * TIB, compact=True)
    header = header_of(image)
    metadata = header.bitmap_size + header.table_size
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(image), str(vast)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout, f"metadata {metadata / MIB:.1f} MiB")
    seconds, busy, grown = map(float, re.findall(r"[0-9.]+", done.stdout))
    assert metadata <= 68 * MIB
    assert grown * MIB <= metadata + 32 * MIB
    assert busy < 0.2
    assert seconds < 0.2 * BUSY


@pytest.mark.parametrize("compact", [False, True])
def test_first_writes_cost_a_tenth_more_than_their_blocks(tmp_path, slots, compact):
    """4 KiB at random places, 32 at a time; records are shared by what commits together."""
    count, size = 8192, 1 << 30
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(size)
    options = {"chunk_size": BLOCK} if compact else {}
    path = make_image(
        tmp_path / "clone.fvd", base=str(base), block_size=BLOCK, compact=compact, **options
    )
    opened = open_image(path)
    device = opened.device
    before = device.counter(slots["image_write_bytes"])
    blocks = random.Random(3).sample(range(size // BLOCK), count)

    def write(number):
        for block in blocks[number::32]:
            device.write(block * BLOCK, b"w" * BLOCK)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.flush()
    written = device.counter(slots["image_write_bytes"]) - before
    opened.close()
    print(f"{written / count:.0f} bytes a block")
    assert written <= 1.1 * BLOCK * count


@pytest.mark.parametrize("compact", [False, True])
def test_a_flush_with_changed_metadata_is_two_flushes_of_the_device(tmp_path, slots, compact):
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * MIB)
    path = make_image(tmp_path / "clone.fvd", base=str(base), block_size=BLOCK, compact=compact)
    opened = open_image(path)
    device = opened.device
    for block in range(20):
        before = device.counter(slots["image_flushes"])
        device.write(block * 3 * BLOCK, b"w" * BLOCK)
        device.flush()
        assert device.counter(slots["image_flushes"]) - before == 2
    opened.close()


def test_a_hostile_journal_is_replayed_in_no_time(tmp_path):
    """1 MiB of records of the whole base, 61440 times 2^28 blocks, by an ordinary open."""
    base = tmp_path / "base.raw"
    with base.open("wb") as file:
        file.truncate(TIB)
    path = make_image(tmp_path / "clone.fvd", base=str(base), block_size=BLOCK, journal_size=MIB)
    header = header_of(path)
    whole = [BitmapRecord(0, TIB // 512)] * 30
    uuid = header.extension.image_uuid
    sectors = [seal_sector(whole, Trailer(1, n + 1), uuid) for n in range(MIB // 512)]
    poke(path, header.journal_offset, b"".join(sectors))
    poke(path, 0, replace(header, clean_shutdown=0).pack())
    begin = time.monotonic()
    opened = open_image(path, read_only=True)
    taken = time.monotonic() - begin
    kinds = {kind for _, kind in opened.device.block_status(TIB // 2, MIB)}
    opened.close()
    print(f"{taken:.2f} s")
    assert kinds == {"zero"}
    assert taken < BUSY
