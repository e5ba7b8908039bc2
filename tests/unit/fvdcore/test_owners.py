# SPDX-License-Identifier: Apache-2.0
"""The layers below the top as one storage: the same bytes as layer after layer."""

import os
import random
from contextlib import closing

import pytest

from fvdcore import Device, EngineFault
from fvdengine.geometry import Wanted
from fvdtest.images import content_on_disk, make_image, open_image, shape_image
from fvdtest.model import FlatModel, base_content, random_range
from fvdtest.remote import Nbdkit

KIB = 1024
MIB = 1024 * KIB
BLOCKS = (512, 4 * KIB, 12 * KIB, 16 * KIB, 64 * KIB)


def change(device, model, rng, times):
    """Writes, zeroings and trims at random; after a trim the model is told what is there."""
    for _ in range(times):
        offset, length = random_range(rng, model.size, 100_000)
        kind = rng.random()
        if kind < 0.7:
            data = rng.randbytes(length)
            device.write(offset, data)
        elif kind < 0.85:
            data = bytes(length)
            device.write_zeroes(offset, length)
        else:
            device.trim(offset, length)
            data = device.read(offset, length)
        model.write(offset, data)


def grow_chain(folder, rng, images, base=None):
    """A chain of random images over base (bytes, or None for none): its top and its content."""
    below, form = None, ""
    model = FlatModel(0)
    if base is not None:
        (folder / "base.raw").write_bytes(base)
        below, form = folder / "base.raw", "raw"
        model = FlatModel(len(base), base)
    for level in range(images):
        size = (model.size + 511) // 512 * 512 + rng.choice([0, 0, 512, 5 * KIB, 300 * KIB])
        size = max(size, 64 * KIB)
        if below is not None and rng.random() < 0.2:
            size = max(size // 2 // 512 * 512, 64 * KIB)
        wanted = Wanted(size, block_size=rng.choice(BLOCKS), is_compact=rng.random() < 0.5)
        if wanted.is_compact:
            # A multiple of 4096 and of the block.
            wanted = Wanted(size, block_size=wanted.block_size, is_compact=True,
                            chunk_size=192 * KIB)  # fmt: skip
        image = shape_image(folder / f"{level}.fvd", below, form, wanted)
        model = FlatModel(size, bytes(model.data))
        opened = open_image(image)
        change(opened.device, model, rng, 3)
        opened.close()
        below, form = image, "fvd"
    return below, model


def check_all_ways(device, model, rng):
    """At random places first, so that the map is filled in an odd order, then all, twice over."""
    for _ in range(60):
        offset, length = random_range(rng, model.size, 200_000)
        assert model.difference(device.read(offset, length), offset) is None
    for _ in range(2):
        assert model.difference(device.read(0, model.size)) is None


def shown_as_zeros(device, model):
    """Whatever block status calls zeros reads as zeros; the extents cover the disk."""
    at = 0
    for length, kind in device.block_status(0, model.size):
        if kind in ("zero", "base-zero"):
            assert not any(model.read(at, length))
        at += length
    assert at == model.size


@pytest.mark.parametrize("seed", range(6))
def test_random_chains_read_as_the_codec_reads_them(tmp_path, seed):
    rng = random.Random(seed)
    size = rng.choice([300_000, MIB, MIB + 4096 + 7])
    base = base_content(rng, size) if seed % 3 else None
    top, model = grow_chain(tmp_path, rng, 4 + seed % 3, base)
    assert content_on_disk(top) == model.data
    opened = open_image(top)
    check_all_ways(opened.device, model, rng)
    shown_as_zeros(opened.device, model)
    change(opened.device, model, rng, 10)
    check_all_ways(opened.device, model, rng)
    opened.close()
    assert content_on_disk(top) == model.data


def stack(folder, layers, size):
    """A chain from the lowest image up, block size 4 KiB, and on top one that is empty: each layer
    is its size and what is written to it, by offset. The top, and what it shows of the begin."""
    below = None
    shown = bytearray(64 * KIB)
    for level, (length, writes) in enumerate([*layers, (size, {})]):
        path = make_image(folder / f"{level}.fvd", size=length, block_size=4 * KIB,
                          base=below, base_format="fvd" if below else None)  # fmt: skip
        shown = shown[:length].ljust(64 * KIB, b"\0")
        opened = open_image(path)
        for offset, data in writes.items():
            opened.device.write(offset, data)
            shown[offset : offset + len(data)] = data
        opened.close()
        below = str(path)
    return path, bytes(shown)


@pytest.mark.parametrize(("size", "lowest"), [
    (64 * KIB, 10 * KIB),  # it ends within a unit, where the one above it goes on
    (1 << 37, 1 << 37),  # a unit has two blocks, or the map would be too large
])  # fmt: skip
def test_a_unit_of_which_a_layer_owns_a_part_is_not_taken_for_its(tmp_path, size, lowest):
    upper = {4 * KIB: b"b" * 4 * KIB, 10 * KIB: b"c" * KIB}
    top, shown = stack(tmp_path, [(lowest, {0: b"a" * 10 * KIB}), (size, upper)], size)
    with closing(open_image(top)) as opened:
        for at in (*range(0, 16 * KIB, KIB), 0):
            assert opened.device.read(at, 16 * KIB - at) == shown[at : 16 * KIB]


def test_copies_on_read_of_a_chain_are_what_was_read(tmp_path):
    rng = random.Random(7)
    top, model = grow_chain(tmp_path, rng, 4, base_content(rng, MIB))
    opened = open_image(top, copy_on_read=True)
    check_all_ways(opened.device, model, rng)
    opened.close()
    # What was copied is right also where no layer below is asked any more.
    changed = os.stat(tmp_path / "base.raw")
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    os.utime(tmp_path / "base.raw", ns=(changed.st_atime_ns, changed.st_mtime_ns))
    opened = open_image(top, read_only=True)
    at = copied = 0
    for length, kind in opened.device.block_status(0, model.size):
        if kind == "data":
            assert model.difference(opened.device.read(at, length), at) is None
            copied += length
        at += length
    opened.close()
    assert copied > MIB // 4


def test_a_chain_over_an_export(tmp_path):
    rng = random.Random(8)
    top, model = grow_chain(tmp_path, rng, 3, base_content(rng, MIB))
    names = [top, tmp_path / "1.fvd", tmp_path / "0.fvd"]
    fds = [os.open(name, os.O_RDWR if name == top else os.O_RDONLY) for name in names]
    with Nbdkit(tmp_path, "file", tmp_path / "base.raw") as server:
        layers = [(fd, "fvd") for fd in fds]
        device = Device.open([*layers, (server.uri, "nbd")])
        device.start()
        check_all_ways(device, model, rng)
        shown_as_zeros(device, model)
        device.close()
    for fd in fds:
        os.close(fd)


def test_an_error_of_a_lower_layer_is_told(tmp_path):
    rng = random.Random(9)
    top, model = grow_chain(tmp_path, rng, 3, rng.randbytes(MIB))
    opened = open_image(top)
    os.truncate(tmp_path / "base.raw", 4096)
    with pytest.raises(EngineFault, match="Input/output error"):
        opened.device.read(0, model.size)
    opened.abandon()


def test_a_map_of_a_vast_chain_is_of_bounded_size(tmp_path):
    """Of the map of 16 Mi units only what is read takes memory."""
    below, form = None, None
    patches = {}
    for level in range(3):
        path = tmp_path / f"{level}.fvd"
        make_image(path, size=1 << 40, compact=True, base=below, base_format=form,
                   block_size=64 * KIB)  # fmt: skip
        opened = open_image(path)
        for at in (level * 64 * KIB, (1 << 39) + level * 4096, (1 << 40) - 4096 * (level + 1)):
            patches[at] = os.urandom(4096)
            opened.device.write(at, patches[at])
        opened.close()
        below, form = str(path), "fvd"
    before = rss()
    opened = open_image(tmp_path / "2.fvd")
    for at, data in patches.items():
        assert opened.device.read(at, 4096) == data
    grown = rss() - before
    opened.close()
    # Bitmaps and tables of three layers, in memory twice where written; of the map some pages.
    assert grown < 160 * MIB


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
