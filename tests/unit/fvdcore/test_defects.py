# SPDX-License-Identifier: Apache-2.0
"""Defects of the first implementation, met with the whole engine over files.

The list is in CONTRIBUTING.md. Bases are never zeros here: what reads storage instead of the base
would otherwise read the right bytes.
"""

import errno
import os
import random
import threading
from dataclasses import replace

import pytest

from fvdengine.check import check_image
from fvdengine.errors import BaseMissing, EngineFailed
from fvdengine.header import Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.repair import repair_image
from fvdtest.forge import disk_bytes, header_of, poke
from fvdtest.images import make_image, open_image

BLOCK = 4096
SIZE = 64 * BLOCK


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(17).randbytes(SIZE))
    return path


@pytest.fixture
def clone(tmp_path, base):
    return make_image(
        tmp_path / "clone.fvd", base=str(base), block_size=BLOCK, journal_size=65536
    )


def crashed(clone):
    """Leave the image as a process does that wrote, flushed, and died."""
    opened = open_image(clone)
    opened.device.write(BLOCK + 100, b"w" * 5000)
    opened.device.flush()
    content = opened.device.read(0, SIZE)
    opened.abandon()
    return content


def test_failed_open_of_a_crashed_image_leaves_it_unclean(clone, base):
    """B2: the base is away once; what was flushed must still be replayed afterwards."""
    content = crashed(clone)
    before = clone.read_bytes()
    base.rename(base.with_suffix(".away"))
    with pytest.raises(BaseMissing):
        open_image(clone)
    assert clone.read_bytes() == before
    base.with_suffix(".away").rename(base)
    opened = open_image(clone)
    assert opened.device.read(0, SIZE) == content
    opened.close()


def test_reader_of_an_unclean_image_sees_what_was_flushed(clone):
    """B10: replayed in memory, and nothing written."""
    content = crashed(clone)
    before = clone.read_bytes()
    opened = open_image(clone, read_only=True)
    assert opened.device.read(0, SIZE) == content
    opened.close()
    assert clone.read_bytes() == before


@pytest.mark.parametrize("copy_on_read", [False, True])
def test_partial_writes_beside_prefetch_keep_the_rest_of_their_blocks(
    clone, base, wait_until, rng, copy_on_read
):
    """B5, B8: sectors of many blocks are written, read and copied at once; each has its owner."""
    expected = bytearray(base.read_bytes())
    opened = open_image(clone, prefetch_delay=0, copy_on_read=copy_on_read)
    device = opened.device
    owned = [[] for _ in range(4)]
    for sector in rng.sample(range(SIZE // 512), 300):
        owned[sector % 4].append(sector)
    for number, sectors in enumerate(owned):
        for sector in sectors:
            expected[sector * 512 : sector * 512 + 512] = bytes([number + 1]) * 512

    def write(number):
        for sector in owned[number]:
            device.write(sector * 512, bytes([number + 1]) * 512)
            device.read(sector // 8 * BLOCK, BLOCK)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: header_of(clone).base_img_fully_prefetched, "prefetch to finish")
    assert device.read(0, SIZE) == expected
    opened.close()
    base.unlink()
    assert disk_bytes(clone) == expected


def test_offsets_beyond_four_billion_sectors_are_exact(tmp_path):
    """B16: a base of 8 TiB; neither bitmap size nor offsets may be cut to 32 bits."""
    base = tmp_path / "base.raw"
    places = [0, (2 << 40) - 512, 2 << 40, (7 << 40) + 1536, (8 << 40) - 512]
    with base.open("wb") as file:
        file.truncate(8 << 40)
        for number, at in enumerate(places):
            file.seek(at)
            file.write(bytes([number + 1]) * 512)
    clone = make_image(tmp_path / "clone.fvd", base=str(base))
    opened = open_image(clone)
    for at in places[1:]:
        opened.device.write(at, b"w" * 100)
    opened.close()
    opened = open_image(clone, read_only=True)
    for number, at in enumerate(places):
        old = bytes([number + 1])
        assert opened.device.read(at, 512) == (b"w" * 100 if number else old * 100) + old * 412
    opened.close()


def test_stored_command_is_never_run(clone, tmp_path):
    """S1: not when the image is opened, filled, or closed."""
    marker = tmp_path / "marker"
    header = header_of(clone)
    poke(clone, 0, replace(header, add_storage_cmd=f"touch {marker} #").pack())
    opened = open_image(clone)
    opened.device.write(0, b"x" * SIZE)
    opened.close()
    assert not marker.exists()
    assert header_of(clone).add_storage_cmd == f"touch {marker} #"


@pytest.mark.parametrize("base_format", ["", "raw"])
def test_header_of_another_format_in_a_raw_base_is_content(clone, base, base_format):
    """S2: a guest may write a qcow2 header that names a host file; nothing is ever probed."""
    secret = b"QFI\xfb" + bytes(3) + b"\2" + (104).to_bytes(8, "big") + (8).to_bytes(4, "big")
    content = (secret + bytes(12) + b"/etc/passwd").ljust(SIZE, b"q")
    status = base.stat()
    base.write_bytes(content)
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    poke(clone, 0, replace(header_of(clone), base_img_fmt=base_format).pack())
    opened = open_image(clone)
    assert opened.device.read(0, SIZE) == content
    opened.device.write(0, b"FVD\0" + b"x" * 100)
    opened.close()
    assert disk_bytes(clone)[:104] == b"FVD\0" + b"x" * 100


@pytest.mark.parametrize("read_only", [False, True])
def test_opening_and_reading_change_no_length(clone, base, read_only):
    """S6: neither the image nor its base is cut or extended by a look at it."""
    lengths = clone.stat().st_size, base.stat().st_size
    opened = open_image(clone, read_only=read_only)
    opened.device.read(0, SIZE)
    opened.close()
    assert (clone.stat().st_size, base.stat().st_size) == lengths
    with open_plan(clone, OpenOptions(read_only=True)) as plan:
        assert [layer.length for layer in plan.layers] == [SIZE, SIZE]


def test_clean_flag_stands_at_both_ends_behind_a_flush(probes, image_of):
    """B7: unclean is durable before any other change; clean is written when all else is."""
    store = probes.storage.Storage(image_of(blocks=16))
    image = probes.image.Image(store, probes.storage.Storage(b"b" * (16 * BLOCK)))
    opening = store.log("write", "flush")
    assert {at for kind, at, *_ in opening if kind == "write"} == {4 * 512, 14 * 512}
    assert opening[-1][0] == "flush"
    assert Header.unpack(store.durable()).clean_shutdown == 0
    assert image.write(0, b"w" * 100) == 0
    assert image.flush() == 0
    assert Header.unpack(store.durable()).clean_shutdown == 0
    store.forget()
    assert image.close() == 0
    closing = [(kind, at) for kind, at, *_ in store.log("write", "flush")]
    assert closing[-4:] == [
        ("flush", 0), ("write", 4 * 512), ("write", 14 * 512), ("flush", 0),
    ]  # fmt: skip
    assert Header.unpack(store.durable()).clean_shutdown == 1
    image.free()


# -- compact images ------------------------------------------------------------------------------

CHUNK = 4 * BLOCK


@pytest.fixture
def compact(tmp_path, base):
    return make_image(
        tmp_path / "compact.fvd", base=str(base), compact=True, block_size=BLOCK,
        chunk_size=CHUNK, journal_size=65536,
    )  # fmt: skip


def test_a_saved_bit_never_goes_before_the_place_of_its_chunk(probes, image_of):
    """B3: a power loss anywhere in a checkpoint; the bit in the bitmap alone would show zeros."""
    content = image_of(
        blocks=64, table_pages=1, chunk_size=CHUNK, storage_grow_unit=CHUNK, journal_pages=1
    )
    header = Header.unpack(content)
    below = probes.storage.Storage(b"b" * SIZE)
    for failing in range(6):
        store = probes.storage.Storage(content, len(content) + SIZE, True)
        image = probes.image.Image(store, below)
        assert image.write(5 * BLOCK, b"w" * BLOCK) == 0
        store.fail("flush", errno.EIO, after=failing)
        done = image.checkpoint()
        assert (done == 0) == (failing > 3)
        # All that was written may have come to the disk by itself, in any part.
        for left in (store.durable(), store.content()):
            bits = left[header.bitmap_offset : header.bitmap_offset + 8]
            entry = left[header.table_offset + 4 : header.table_offset + 8]
            assert not any(bits) or entry == bytes(4)
        again = probes.image.Image(
            probes.storage.Storage(store.durable(), len(content) + SIZE, True), below
        )
        wanted = b"w" if failing >= 3 else b"b"
        assert again.read(5 * BLOCK, BLOCK) == wanted * BLOCK
        again.free()
        image.free()


def test_growth_of_the_file_is_durable_before_a_place_in_it(probes, image_of):
    """B13: after a power loss no entry may name a place behind the file's end."""
    content = image_of(
        blocks=0, size=SIZE, table_pages=1, chunk_size=CHUNK, storage_grow_unit=2 * CHUNK
    )
    store = probes.storage.Storage(content, len(content) + SIZE, True)
    image = probes.image.Image(store)
    for chunk in range(8):
        store.forget()
        assert image.write(chunk * CHUNK, b"w" * CHUNK) == 0
        grown = store.log("resize") != []
        store.forget()
        assert image.flush() == 0
        kinds = [entry[0] for entry in store.log("write", "flush")]
        assert kinds == (["flush"] if grown else []) + ["write", "flush"]
    image.free()


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_a_grown_image_opens_again(compact, end):
    """B13: whatever was reached of the growth, the image is never refused."""
    opened = open_image(compact)
    opened.device.write(3, b"w" * 1000)
    opened.device.flush()
    opened.device.write(9 * CHUNK, b"v" * 1000)
    getattr(opened, end)()
    opened = open_image(compact)
    assert opened.device.read(3, 1000) == b"w" * 1000
    opened.close()
    assert check_image(compact).exit_status == 0


def test_a_cut_compact_image_is_refused_by_name_and_mended_by_repair(compact, base):
    """B13: the first implementation had no way back from it."""
    opened = open_image(compact)
    opened.device.write(0, b"w" * 2 * CHUNK)
    opened.close()
    os.truncate(compact, compact.stat().st_size - CHUNK)
    before = compact.read_bytes()
    with pytest.raises(EngineFailed, match="outside storage"):
        open_image(compact)
    assert compact.read_bytes() == before
    repair_image(compact)
    opened = open_image(compact)
    assert opened.device.read(0, CHUNK) == b"w" * CHUNK
    assert opened.device.read(2 * CHUNK, SIZE - 2 * CHUNK) == base.read_bytes()[2 * CHUNK :]
    opened.close()


def test_storage_that_was_used_before_shows_nothing_of_it(tmp_path):
    """S4: one chunk's data is gone when its place belongs to another."""
    path = make_image(
        tmp_path / "empty.fvd", size=SIZE, compact=True, chunk_size=CHUNK, journal_size=65536
    )
    opened = open_image(path)
    device = opened.device
    device.write(0, b"secret.." * (8 * CHUNK // 8))
    device.trim(0, 8 * CHUNK)
    opened.close()
    opened = open_image(path)
    device = opened.device
    for chunk in range(4, 12):
        device.write(chunk * CHUNK + 1000, b"x" * 10)
    seen = device.read(0, SIZE)
    assert b"secret" not in seen
    assert seen.count(b"x") == 80
    opened.close()
    assert b"secret" not in disk_bytes(path)


def test_requests_over_many_chunks_record_all_of_them(compact, base, wait_until):
    """B4: what is copied from the base may lie in several chunks, and a chunk in several copies."""
    opened = open_image(compact, prefetch_delay=0)
    wait_until(lambda: header_of(compact).base_img_fully_prefetched, "prefetch to finish")
    opened.abandon()
    content = base.read_bytes()
    base.unlink()
    assert disk_bytes(compact) == content


def test_a_copied_range_across_a_chunk_border_is_recorded_whole(compact, base):
    """B4, copy-on-read: read, die after a flush, and read the files alone."""
    opened = open_image(compact, copy_on_read=True)
    opened.device.read(CHUNK - BLOCK, 2 * BLOCK)
    opened.device.flush()
    opened.abandon()
    assert disk_bytes(compact) == base.read_bytes()
    opened = open_image(compact, read_only=True)
    kinds = opened.device.block_status(CHUNK - BLOCK, 2 * BLOCK)
    opened.close()
    assert {kind for _, kind in kinds} == {"data"}
