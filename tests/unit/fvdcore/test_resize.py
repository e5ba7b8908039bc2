# SPDX-License-Identifier: Apache-2.0
"""Growing a disk that is in use: raw, compact, with and without moving chunks for the table."""

import contextlib
import errno
import os
import random
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from fvdcore import Device, EngineFault
from fvdengine.check import check_image
from fvdengine.findings import Severity
from fvdengine.geometry import Wanted
from fvdengine.header import Header
from fvdengine.repair import repair_image
from fvdtest.images import content_on_disk, open_image, shape_image

MIB = 1 << 20
CHUNK = 4096
TABLE_FULL = 1024 * CHUNK  # a table of one page has an entry for each chunk of such a disk


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(TABLE_FULL))
    return path


@pytest.fixture
def memory(tmp_path):
    """A folder where a flush costs nothing, so that guests meet growing and not the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def tight(tmp_path, base):
    """A compact clone whose table is full and has the chunks right behind it."""
    wanted = Wanted(TABLE_FULL, is_compact=True, chunk_size=CHUNK, block_size=CHUNK,
                    journal_size=65536)  # fmt: skip
    return shape_image(tmp_path / "clone.fvd", base, "raw", wanted, is_tight=True)


@pytest.fixture
def resizes(probes):
    """Resizes that a device counted: good ones, bad ones, bytes."""
    slots = probes.plain.slots()

    def counted(device):
        names = ("resizes", "resize_errors", "resize_bytes")
        return tuple(device.counter(slots[name]) for name in names)

    return counted


def header_of(path):
    with path.open("rb") as file:
        return Header.unpack(file.read(8192))


def is_sound(path):
    return check_image(path).exit_status == 0


@pytest.mark.parametrize("data_file", ["", "data.raw"])
@pytest.mark.parametrize("is_compact", [False, True])
def test_what_is_new_reads_zeros_and_stays(tmp_path, base, resizes, is_compact, data_file):
    wanted = Wanted(
        MIB + 512, is_compact=is_compact, chunk_size=65536, has_data_file=bool(data_file)
    )
    image = shape_image(tmp_path / "a.fvd", base, "raw", wanted, data_file)
    model = bytearray(base.read_bytes()[: MIB + 512])
    opened = open_image(image)
    opened.device.write(MIB, b"e" * 512)
    model[MIB:] = b"e" * 512
    opened.device.resize(3 * MIB)
    assert resizes(opened.device) == (1, 0, 2 * MIB - 512)
    model += bytes(3 * MIB - len(model))
    assert opened.device.size == 3 * MIB
    assert opened.device.read(0, 3 * MIB) == model
    opened.device.write(3 * MIB - 700, b"z" * 700)
    model[-700:] = b"z" * 700
    opened.close()
    assert content_on_disk(image) == model
    assert header_of(image).virtual_disk_size == 3 * MIB
    assert header_of(image).base_img_size == MIB + 512
    assert is_sound(image)


def test_content_behind_a_raw_disk_does_not_show(tmp_path):
    image = shape_image(tmp_path / "a.fvd", None, "raw", Wanted(MIB))
    with image.open("ab") as file:
        file.write(b"left by somebody" * 4096)
    opened = open_image(image)
    opened.device.resize(2 * MIB)
    assert opened.device.read(MIB, MIB) == bytes(MIB)
    opened.close()


def test_a_table_that_grows_moves_the_chunks_in_its_way(tight, base):
    opened = open_image(tight)
    model = bytearray(base.read_bytes())
    for chunk in (9, 4, 700):
        model[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes([chunk % 251]) * CHUNK
        opened.device.write(chunk * CHUNK, bytes([chunk % 251]) * CHUNK)
    before = header_of(tight)
    opened.device.resize(3 * TABLE_FULL)
    model += bytes(2 * TABLE_FULL)
    assert opened.device.read(0, len(model)) == model
    opened.device.write(3 * TABLE_FULL - CHUNK, b"x" * CHUNK)
    model[-CHUNK:] = b"x" * CHUNK
    opened.device.flush()
    after = header_of(tight)
    assert (before.table_size, after.table_size) == (4096, 12288)
    assert (before.chunks_relocated, after.chunks_relocated) == (0, 1)
    assert after.data_offset == before.data_offset < after.table_offset + after.table_size
    assert content_on_disk(tight) == model
    opened.close()
    assert content_on_disk(tight) == model
    assert is_sound(tight)
    again = open_image(tight)
    assert again.device.read(0, len(model)) == model
    again.close()


@pytest.mark.parametrize("size", [4 * CHUNK, TABLE_FULL, TABLE_FULL + CHUNK, 3 * TABLE_FULL])
def test_entries_behind_the_last_chunk_mean_nothing_once_the_disk_has_grown(tmp_path, size):
    wanted = Wanted(3 * CHUNK, is_compact=True, chunk_size=CHUNK, block_size=CHUNK,
                    journal_size=65536)  # fmt: skip
    image = shape_image(tmp_path / "a.fvd", None, "raw", wanted, is_tight=True)
    with image.open("r+b") as file:
        file.seek(header_of(image).table_offset + 4 * 3)
        file.write(bytes(4096 - 4 * 3))
    opened = open_image(image)
    opened.device.resize(size)
    opened.close()
    assert is_sound(image)
    again = open_image(image)
    assert again.device.read(0, size) == bytes(size)
    again.close()


def test_a_successor_goes_on_after_growing(tmp_path, tight, base):
    """I7: the table of live memory has grown with the disk."""
    opened = open_image(tight, live_dir=tmp_path / "live")
    model = bytearray(base.read_bytes())
    opened.device.write(0, b"first" * 1000)
    model[:5000] = b"first" * 1000
    opened.device.resize(2 * TABLE_FULL)
    opened.device.write(2 * TABLE_FULL - 5000, b"later" * 1000)
    model += bytes(TABLE_FULL - 5000) + b"later" * 1000
    opened.abandon()
    successor = open_image(tight, live_dir=tmp_path / "live", takeover=True)
    assert successor.device.read(0, len(model)) == model
    successor.close()
    assert content_on_disk(tight) == model


def test_guests_go_on_while_the_disk_grows(memory, base):
    wanted = Wanted(TABLE_FULL, is_compact=True, chunk_size=CHUNK, block_size=CHUNK,
                    journal_size=65536)  # fmt: skip
    (memory / "base.raw").write_bytes(base.read_bytes())
    tight = shape_image(memory / "a.fvd", memory / "base.raw", "raw", wanted, is_tight=True)
    opened = open_image(tight)
    device = opened.device
    model = bytearray(base.read_bytes())
    stop = threading.Event()
    failures = []

    def guest(number):
        noise = random.Random(number)
        lower = number * TABLE_FULL // 4
        try:
            while not stop.is_set():
                offset = lower + noise.randrange(TABLE_FULL // 4 - 3000)
                data = noise.randbytes(noise.randrange(1, 3000))
                device.write(offset, data)
                model[offset : offset + len(data)] = data
                assert device.read(offset, len(data)) == data
                if noise.random() < 0.1:
                    chunk = (offset + CHUNK - 1) // CHUNK * CHUNK
                    if chunk + CHUNK <= lower + TABLE_FULL // 4:
                        device.trim(chunk, CHUNK)
                        model[chunk : chunk + CHUNK] = device.read(chunk, CHUNK)
        except Exception as error:
            failures.append(error)

    guests = [threading.Thread(target=guest, args=(number,)) for number in range(4)]
    for one in guests:
        one.start()
    size = TABLE_FULL
    for step in (512, TABLE_FULL, 3 * TABLE_FULL, 4096, 9 * TABLE_FULL):
        size += step
        device.resize(size)
    stop.set()
    for one in guests:
        one.join()
    assert not failures
    assert device.read(0, TABLE_FULL) == model
    assert device.read(TABLE_FULL, size - TABLE_FULL) == bytes(size - TABLE_FULL)
    opened.close()
    assert content_on_disk(tight)[:TABLE_FULL] == model
    assert is_sound(tight)


@pytest.mark.parametrize("size", [0, 512, TABLE_FULL, TABLE_FULL + 1, TABLE_FULL + 511])
def test_only_whole_sectors_more(tight, size):
    opened = open_image(tight)
    with pytest.raises(ValueError, match="cannot grow"):
        opened.device.resize(size)
    assert opened.device.size == TABLE_FULL
    opened.close()


def test_a_disk_beyond_the_table_s_limit_is_refused(tight):
    opened = open_image(tight)
    with pytest.raises(EngineFault) as caught:
        opened.device.resize(1 << 50)
    assert caught.value.errno == errno.EFBIG
    opened.device.write(0, b"still alive")
    opened.close()
    assert header_of(tight).virtual_disk_size == TABLE_FULL
    assert is_sound(tight)


def test_a_read_only_device_does_not_grow(tight, base):
    fds = os.open(tight, os.O_RDONLY), os.open(base, os.O_RDONLY)
    device = Device.open([(fds[0], "fvd"), (fds[1], "raw")], read_only=True)
    with pytest.raises(EngineFault) as caught:
        device.resize(2 * TABLE_FULL)
    assert caught.value.errno == errno.EROFS
    device.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("kind", ["write", "flush", "resize"])
@pytest.mark.parametrize("shape", ["tight", "compact", "raw"])
def test_whatever_stops_growing_leaves_the_old_disk_or_the_new_one(
    probes, memory, base, shape, kind
):
    """After so many writes the process dies, after so many flushes the power is cut; or there is no
    space."""
    (memory / "base.raw").write_bytes(base.read_bytes())
    wanted = Wanted(TABLE_FULL, is_compact=shape != "raw", chunk_size=CHUNK, block_size=CHUNK,
                    journal_size=65536)  # fmt: skip
    path = shape_image(
        memory / "a.fvd", memory / "base.raw", "raw", wanted, is_tight=shape == "tight"
    )
    before, content = path.read_bytes(), content_on_disk(path)
    new = TABLE_FULL + 7 * CHUNK + 512
    ended = set()
    for steps in range(60):
        store = probes.storage.Storage(before, 4 * len(before), grows=True)
        image = probes.image.Image(store, probes.storage.Storage(base.read_bytes()))
        store.fail(kind, errno.ENOSPC if kind == "resize" else errno.EIO, steps, always=True)
        rc = image.grow(new)
        path.write_bytes(store.durable() if kind == "flush" else store.content())
        image.free()
        size = header_of(path).virtual_disk_size
        ended.add((rc == 0, size))
        assert size in (TABLE_FULL, new)
        assert not [
            finding.message for finding in check_image(path).findings
            if finding.severity is Severity.CORRUPT
        ]  # fmt: skip
        assert content_on_disk(path) == content + bytes(size - TABLE_FULL)
        opened = open_image(path)
        assert opened.device.read(0, size) == content + bytes(size - TABLE_FULL)
        opened.close()
        # A raw file that was made longer stays so; one repair gives that back.
        assert is_sound(path) or (shape == "raw" and repair_image(path).exit_status == 0)
        if rc == 0:
            break
    assert ended >= {(True, new)}
    assert kind == "resize" or (False, TABLE_FULL) in ended


def test_a_moved_chunk_is_durable_before_a_block_of_it_gets_there(
    probes, memory, base, task, wait_until
):
    """The journal has room for one commit, which says where the chunks were: a crash in the next
    checkpoint, which saves their new places, replays that."""
    (memory / "base.raw").write_bytes(base.read_bytes())
    wanted = Wanted(TABLE_FULL, is_compact=True, chunk_size=CHUNK, block_size=1024,
                    journal_size=4096)  # fmt: skip
    path = shape_image(memory / "a.fvd", memory / "base.raw", "raw", wanted, is_tight=True)
    before = path.read_bytes()
    old, first, late = base.read_bytes()[1024:2048], b"1" * 1024, b"2" * 1024
    seen = set()
    for flushes in range(60):
        store = probes.storage.Storage(before, 4 * len(before), grows=True)
        image = probes.image.Image(store, probes.storage.Storage(base.read_bytes()))
        for chunk in range(2):
            assert image.write(chunk * CHUNK, first) == 0
        assert image.flush() == 0
        store.fail("flush", errno.EIO, flushes, always=True)
        store.hold("read")
        store.pass_one("read")  # of the first chunk, which is moved; the other waits
        growing = task(image.grow, 3 * TABLE_FULL)
        wait_until(lambda s=store, g=growing: s.waiting("read") or not g.is_alive(), "the second")
        image.write(1024, late)
        store.release("read")
        rc = growing.result()
        for data in (store.content(), store.durable()):
            path.write_bytes(data)
            opened = open_image(path)
            assert opened.device.read(0, 1024) == opened.device.read(CHUNK, 1024) == first
            found = opened.device.read(1024, 1024)
            opened.close()
            assert found in (old, late), flushes
            seen.add(found)
        image.free()
        if rc == 0:
            break
    assert seen == {old, late}


def test_closing_waits_for_a_disk_that_grows(tight):
    opened = open_image(tight)
    grown = []
    begun = threading.Event()

    def grow():
        with contextlib.suppress(ValueError):  # closed
            for step in range(1, 1000):
                opened.device.resize(TABLE_FULL + step * CHUNK)
                grown.append(TABLE_FULL + step * CHUNK)
                begun.set()

    thread = threading.Thread(target=grow)
    thread.start()
    begun.wait(30)
    opened.close()
    thread.join()
    assert header_of(tight).virtual_disk_size == grown[-1]
    assert header_of(tight).clean_shutdown
    assert is_sound(tight)
