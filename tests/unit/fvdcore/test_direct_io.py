# SPDX-License-Identifier: Apache-2.0
"""Cache modes: data past the page cache, of any alignment, and writes that are durable at once."""

import ctypes
import errno
import os
import random
import socket
import threading

import pytest

from fvdcore import Device
from fvdengine import opening
from fvdengine.errors import NoDirectIo
from fvdengine.geometry import Wanted
from fvdengine.header import Header
from fvdengine.live import STATS_NAME, create_stats
from fvdengine.stats import read_stats
from fvdtest.images import content_on_disk, make_image, open_image, shape_image
from fvdtest.model import FlatModel, base_content, random_range
from fvdtest.nbd_client import NbdClient

KIB = 1024
MIB = 1024 * KIB
SIZE = 4 * MIB
CACHESTAT = 451


def cached_pages(path, begin):
    """Pages of the file from begin on in the page cache; None where the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        where = (ctypes.c_uint64 * 2)(begin, os.fstat(file.fileno()).st_size - begin)
        found = (ctypes.c_uint64 * 5)()
        failed = libc.syscall(CACHESTAT, file.fileno(), where, found, 0)
    return None if failed else found[0]


def direct_descriptors(path):
    """Descriptors of this process that have the file open with O_DIRECT."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                with open(f"/proc/self/fdinfo/{name}") as file:
                    flags = int(file.read().split("flags:")[1].split()[0], 8)
                if flags & os.O_DIRECT:
                    found.append(int(name))
        except OSError:
            continue
    return found


def data_begin(path):
    with path.open("rb") as file:
        return Header.unpack(os.pread(file.fileno(), 8192, 0), str(path)).data_offset


def shaped(folder, kind, rng):
    """An image of that kind and its content; its disk ends within a page."""
    size = SIZE + 512
    if kind == "clone":
        base = base_content(rng, SIZE)
        (folder / "base.raw").write_bytes(base)
        image = make_image(folder / "image.fvd", size=size, base=str(folder / "base.raw"))
        return image, FlatModel(size, base)
    data = "image.data" if kind == "data file" else ""
    wanted = Wanted(size, is_compact=kind == "compact", chunk_size=64 * KIB if kind == "compact"
                    else None, has_data_file=bool(data))  # fmt: skip
    return shape_image(folder / "image.fvd", None, "", wanted, data_file=data), FlatModel(size)


@pytest.mark.parametrize("kind", ["raw", "compact", "clone", "data file"])
def test_requests_of_any_alignment_are_right_and_nothing_is_cached(tmp_path, kind):
    rng = random.Random(kind)
    image, model = shaped(tmp_path, kind, rng)
    storage = tmp_path / "image.data" if kind == "data file" else image
    begin = data_begin(image)
    opened = open_image(image, cache="none")
    assert direct_descriptors(storage)
    for _ in range(60):
        offset, length = random_range(rng, model.size, 200_000)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            opened.device.write(offset, data)
            model.write(offset, data)
        else:
            assert model.difference(opened.device.read(offset, length), offset) is None
    tail = rng.randbytes(5000)
    opened.device.write(model.size - 5000, tail)
    model.write(model.size - 5000, tail)
    opened.device.write_zeroes(100, 300_001)
    model.write(100, bytes(300_001))
    assert model.difference(opened.device.read(0, model.size)) is None
    opened.device.flush()
    cached = cached_pages(storage, begin)
    # The file's last, partial page, and what a file system zeroes of pages in part.
    assert cached is None or cached <= 8
    opened.close()
    assert not direct_descriptors(storage)
    assert content_on_disk(image) == model.data


def test_neighbours_within_a_unit_do_not_lose_each_other_s_writes(tmp_path):
    """Parts of sectors and whole pages around them, from several threads."""
    opened = open_image(make_image(tmp_path / "image.fvd", size=MIB), cache="none")
    pieces = [(at, 100 + at % 7 * 150) for at in range(0, 64 * KIB, 1200)]
    whole = [(at, 4096) for at in range(64 * KIB, 128 * KIB, 4096)]

    def write(mine, times):
        for number in range(times):
            for at, length in mine:
                opened.device.write(at, bytes([number + 1]) * length)

    threads = [threading.Thread(target=write, args=(pieces[part::3], 4)) for part in range(3)]
    threads.append(threading.Thread(target=write, args=(whole, 4)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = bytearray(MIB)
    for at, length in pieces + whole:
        expected[at : at + length] = b"\4" * length
    assert opened.device.read(0, MIB) == expected
    opened.close()


def test_a_server_answers_right_past_the_cache(tmp_path):
    """Requests over a connection: none is served on its thread, all by the crew."""
    image = make_image(tmp_path / "image.fvd", size=SIZE, compact=True)
    opened = open_image(image, cache="none")
    model, rng = FlatModel(SIZE), random.Random(3)
    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    opened.device.serve(theirs.detach())
    client = NbdClient(mine)
    for _ in range(40):
        offset, length = random_range(rng, SIZE, 300_000)
        data = rng.randbytes(length)
        client.write(offset, data)
        model.write(offset, data)
        offset, length = random_range(rng, SIZE, 300_000)
        assert model.difference(client.read(offset, length), offset) is None
    client.close()
    opened.close()
    assert content_on_disk(image) == model.data


def test_what_was_cached_before_is_read_and_what_bypassed_is_seen_by_others(tmp_path):
    image = make_image(tmp_path / "image.fvd", size=MIB)
    opened = open_image(image)
    opened.device.write(0, b"c" * MIB)
    opened.close()
    opened = open_image(image, cache="none")
    assert opened.device.read(0, MIB) == b"c" * MIB
    opened.device.write(0, b"d" * (MIB // 2))
    assert content_on_disk(image) == b"d" * (MIB // 2) + b"c" * (MIB // 2)
    opened.close()


def test_a_takeover_goes_on_past_the_cache(tmp_path):
    image = make_image(tmp_path / "image.fvd", size=MIB, compact=True)
    live = tmp_path / "live"
    live.mkdir()
    first = open_image(image, cache="none", live_dir=live)
    first.device.write(5, b"acknowledged")
    first.abandon()
    second = open_image(image, cache="none", live_dir=live, takeover=True)
    assert second.device.read(5, 12) == b"acknowledged"
    second.close()


def test_a_file_that_cannot_be_opened_so_is_refused_and_untouched(tmp_path, monkeypatch):
    image = make_image(tmp_path / "image.fvd", size=MIB)
    before = image.read_bytes()
    usual = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return usual(path, flags, *rest, **more)

    monkeypatch.setattr(opening.os, "open", refuse)
    with pytest.raises(NoDirectIo, match=r"image\.fvd cannot go past the page cache: Invalid"):
        open_image(image, cache="none")
    monkeypatch.undo()
    assert image.read_bytes() == before
    open_image(image).close()  # nothing holds it


@pytest.mark.parametrize(
    "wrong",
    [{"cache": "unsafe"}, {"cache": "none"}, {"cache": "writeback", "direct_fd": 0}],
    ids=["mode", "no descriptor", "descriptor"],
)
def test_modes_that_are_none_are_refused_before_anything_is_written(tmp_path, wrong):
    image = make_image(tmp_path / "image.fvd", size=MIB)
    before = image.read_bytes()
    fd = os.open(image, os.O_RDWR)
    with pytest.raises(ValueError, match="cache"):
        Device.open([(fd, "fvd")], **wrong)
    os.close(fd)
    assert image.read_bytes() == before


@pytest.mark.parametrize(("cache", "each"), [("writeback", 0), ("writethrough", 1)])
@pytest.mark.parametrize("compact", [False, True], ids=["raw", "compact"])
def test_writes_are_durable_when_they_are_answered(tmp_path, cache, each, compact):
    """Every change that a client has an answer to was flushed, though nobody asked for it."""
    stats = create_stats(tmp_path)
    opened = open_image(make_image(tmp_path / "image.fvd", size=SIZE, compact=compact),
                        cache=cache, stats_fd=stats)  # fmt: skip
    os.close(stats)

    def flushes():
        return read_stats(tmp_path / STATS_NAME).counters["image_flushes"]

    mine, theirs = socket.socketpair()
    mine.settimeout(20)
    opened.device.serve(theirs.detach())
    client = NbdClient(mine)
    client.write(0, b"a" * MIB)
    client.flush()
    changes = [
        lambda: client.write(0, b"b" * 4096),
        lambda: client.write(MIB, b"c" * 5000),
        lambda: client.write_zeroes(8192, 4096),
        lambda: client.trim(MIB, 4096),
        lambda: client.write(5, b"d"),
    ]
    for change in changes:
        before = flushes()
        change()
        assert flushes() - before >= each
        assert each or flushes() == before
    client.close()
    opened.close()
