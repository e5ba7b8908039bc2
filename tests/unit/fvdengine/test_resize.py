# SPDX-License-Identifier: Apache-2.0
"""Resize: sizes are judged before anything happens, shrinking survives every crash."""

import os
import random
import struct
import sys
import types
from dataclasses import replace
from typing import ClassVar

import pytest

from fvdengine import chain, editing, resize
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.data_file import DataFile
from fvdengine.errors import (
    EngineFailed,
    FileTooLarge,
    ImageInUse,
    InvalidOption,
    InvalidSize,
    LiveStateLeft,
    NoSpace,
    TailInUse,
)
from fvdengine.opening import open_plan
from fvdengine.options import CreateOptions
from fvdengine.records import BitmapRecord, TableRecord
from fvdengine.resize import ResizeOptions, check_size, resize_image, wanted_size
from fvdtest.forge import (
    BLOCK,
    CHUNK,
    Forged,
    disk_bytes,
    forge_image,
    header_of,
    poke,
    put_records,
)
from fvdtest.images import open_image

SHRINK = ResizeOptions(shrink=True)
FORCE = ResizeOptions(shrink=True, force=True)
SIZE = 1 << 18

LAYOUTS = {
    "raw": {"filled": range(64)},
    "raw over a base": {"base": True, "local": range(1, 60, 2), "filled": range(0, 64, 3)},
    "raw with a data file": {"data_file": "x.data", "filled": range(64)},
    "compact": {"places": {0: 4, 1: 0, 5: 2, 12: 1, 15: 6}},
    "compact over a base": {
        "base": True, "places": {0: 4, 1: 0, 5: 2, 11: 5, 12: 1, 15: 6}, "local": range(1, 60),
    },
    "compact with a data file": {
        "base": True, "places": {0: 4, 3: 2, 8: 1, 15: 0}, "local": range(60),
        "data_file": "x.data",
    },
}  # fmt: skip
NEW_SIZES = [CHUNK * 3, CHUNK * 5 + 1536, SIZE - 512, 512]


@pytest.fixture
def forge(tmp_path):
    """A function that makes c.fvd of one of the layouts, over a base shorter than the disk."""

    def make(**values):
        if values.get("base"):
            values["base"] = tmp_path / "base.raw"
            values["base"].write_bytes(random.Random(3).randbytes(SIZE - 3 * BLOCK - 512))
        path = tmp_path / "c.fvd"
        forge_image(path, Forged(size=SIZE, **values))
        return path

    return make


def files_of(path):
    return {str(p): p.read_bytes() for p in path.parent.iterdir() if p.suffix in (".fvd", ".data")}


def grown_again(path, size):
    """What the disk shows when it is grown in the simplest way."""
    header = header_of(path)
    new = replace(header, virtual_disk_size=size)
    poke(path, 0, new.pack())
    if not header.is_compact:
        os.truncate(
            path.parent / header.data_file if header.data_file else path, header.data_offset + size
        )
    return disk_bytes(path)


# What is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("1M", 1 << 20), ("+512", 1024), ("+1k", 1536), ("512", 512)]
)
def test_size_is_read(text, size):
    assert wanted_size(text, 512) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [("1000", "1024 bytes"), ("+100", "multiple of 512"), ("-1M", "number"), ("0", "at least 512"),
     ("", "number"), ("9P9", "number"), ("8E", "larger than")],
)  # fmt: skip
def test_bad_size_changes_nothing(image, digest, text, words):
    before = digest(image)
    with pytest.raises(InvalidSize) as caught:
        resize_image(image, text)
    assert words in caught.value.message + caught.value.hint
    assert digest(image) == before


def test_size_that_no_file_can_have_is_refused(image, digest):
    before = digest(image)
    with pytest.raises(InvalidSize, match="larger than a disk"):
        resize_image(image, str((1 << 63) - 512))
    assert digest(image) == before


def test_table_above_the_memory_limit_is_refused(forge, digest):
    path = forge(places={})
    before = digest(path)
    with pytest.raises(InvalidSize, match="limit of 1 GiB") as caught:
        resize_image(path, str((CHUNK << 28) + CHUNK))
    assert "--chunk-size" in caught.value.hint
    assert digest(path) == before
    check_size(header_of(path), CHUNK << 28)


def test_device_that_is_too_small_is_refused(image):
    header = header_of(image)
    check_size(header, 1 << 20, header.data_offset + (1 << 20))
    with pytest.raises(InvalidSize, match="its device has"):
        check_size(header, (1 << 20) + 512, header.data_offset + (1 << 20))


def test_smaller_disk_needs_the_word_shrink(image, digest):
    before = digest(image)
    with pytest.raises(InvalidOption, match="smaller than the present one") as caught:
        resize_image(image, "512k")
    assert "--shrink" in caught.value.hint
    with pytest.raises(InvalidOption, match="--force"):
        resize_image(image, "2M", ResizeOptions(force=True))
    assert digest(image) == before


def test_same_size_changes_nothing(image, digest):
    before = digest(image)
    assert resize_image(image, "1M").new_size == 1 << 20
    assert resize_image(image, "1M", FORCE).new_size == 1 << 20
    assert digest(image) == before


@pytest.mark.parametrize("options", [SHRINK, FORCE])
def test_image_in_use_or_left_by_a_dead_process_is_refused(image, change, digest, options):
    with open_plan(image), pytest.raises(ImageInUse):
        resize_image(image, "512k", options)
    change(clean_shutdown=0, ext_boot_id=chain.boot_id())
    before = digest(image)
    with pytest.raises(LiveStateLeft):
        resize_image(image, "512k", options)
    assert digest(image) == before


@pytest.mark.parametrize("text", ["128k", "+0", "+1M"])
def test_change_that_another_is_making_is_no_damage(forge, text):
    """In the middle of a shrink header and copy may differ for whoever has no lock."""
    path = forge(**LAYOUTS["raw over a base"])
    with editing.open_for_change(str(path)):
        poke(path, 2112, struct.pack("<Q", BLOCK))
        with pytest.raises(ImageInUse):
            resize_image(path, text, FORCE)


def test_data_on_an_nbd_server_cannot_be_cut(forge, monkeypatch, digest):
    path = forge(places={})
    server = DataFile("nbd://host/disk", -1)
    monkeypatch.setattr(resize, "open_data_file", lambda *_: server)
    before = digest(path)
    with pytest.raises(InvalidOption, match="NBD server and cannot shrink"):
        resize_image(path, "64k", SHRINK)
    assert resize_image(path, str(SIZE)).new_size == SIZE
    assert digest(path) == before


@pytest.mark.parametrize("compact", [False, True])
def test_size_that_the_engine_does_not_open_changes_nothing(tmp_path, digest, compact):
    path = tmp_path / "n.fvd"
    create_image(path, CreateOptions(size=1 << 20, compact=compact))
    before = digest(path)
    with pytest.raises(InvalidSize, match="larger than a disk can be"):
        resize_image(path, "+7E")
    assert digest(path) == before


# Shrinking ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "what"),
    [
        ({"filled": [63]}, "data behind it, at 258048"),
        ({"base": True}, "content of the base"),
        ({"places": {15: 0}}, "data behind it, at 245760"),
        ({"data_file": "x.data", "filled": [40]}, "data behind it, at 163840"),
    ],
    ids=["raw", "base", "compact", "data file"],
)
def test_tail_that_is_not_empty_is_kept(forge, layout, what):
    path = forge(**layout)
    before = files_of(path)
    with pytest.raises(TailInUse, match=what) as caught:
        resize_image(path, str(2 * CHUNK), SHRINK)
    assert "--force" in caught.value.hint
    assert files_of(path) == before


@pytest.mark.parametrize(
    "layout",
    [
        {"filled": [0, 1]},
        {"base": True, "local": range(64), "filled": [0, 7]},
        {"places": {0: 1, 1: 0}},
        {"places": {0: 1, 1: 0}, "base": True, "local": range(8, 64)},
        {"data_file": "x.data", "filled": [0]},
    ],
    ids=str,
)
def test_empty_tail_is_cut_without_force(forge, layout):
    path = forge(**layout)
    before = disk_bytes(path)
    resize_image(path, str(2 * CHUNK), SHRINK)
    assert disk_bytes(path) == before[: 2 * CHUNK]
    assert check_image(path).exit_status == 0


@pytest.mark.parametrize("layout", [{}, {"places": {0: 1}}, {"data_file": "x.data"}], ids=str)
def test_zeros_of_the_base_are_empty(forge, layout):
    """What reads as zeros is no loss, wherever it comes from; a base that is away may hold all."""
    path = forge(base=True, **layout)
    base = path.parent / "base.raw"
    content = base.read_bytes()[: 2 * CHUNK]
    status = base.stat()
    base.write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = files_of(path)
    base.rename(base.with_suffix(".away"))
    with pytest.raises(TailInUse, match="content of the base behind it, at 32768"):
        resize_image(path, str(2 * CHUNK), SHRINK)
    base.with_suffix(".away").rename(base)
    with pytest.raises(TailInUse, match="content of the base behind it, at 28672"):
        resize_image(path, "28k", SHRINK)
    assert files_of(path) == before
    resize_image(path, str(2 * CHUNK), SHRINK)
    assert check_image(path).exit_status == 0
    assert disk_bytes(path)[CHUNK:] == content[CHUNK:]


def test_zeros_that_were_written_are_empty(forge):
    path = forge(filled=[0])
    header = header_of(path)
    poke(path, header.data_offset + SIZE - BLOCK, bytes(BLOCK))
    resize_image(path, str(BLOCK), SHRINK)
    assert check_image(path).findings == []


@pytest.mark.parametrize("size", NEW_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forced_cut_keeps_the_rest_and_growing_again_shows_zeros(forge, layout, size):
    path = forge(**layout)
    before, old = disk_bytes(path), header_of(path)
    result = resize_image(path, str(size), FORCE)
    assert (result.old_size, result.new_size) == (SIZE, size)
    new = header_of(path)
    assert disk_bytes(path) == before[:size]
    assert new.is_clean
    assert new.base_img_size == min(old.base_img_size, size)
    assert new.extension.open_session != old.extension.open_session
    assert [f.code for f in check_image(path).findings] == []
    assert path.read_bytes()[:2048] == path.read_bytes()[8192:10240]
    assert grown_again(path, SIZE) == before[:size].ljust(SIZE, b"\0")


@pytest.mark.parametrize("name", ["raw", "raw over a base"])
def test_engine_sees_the_cut_disk_and_goes_on_with_it(forge, name):
    path = forge(**LAYOUTS[name])
    size = CHUNK * 5 + 1536
    content = bytearray(disk_bytes(path)[:size])
    resize_image(path, str(size), FORCE)
    opened = open_image(path)
    assert opened.device.read(0, size) == content
    content[size - 3000 :] = b"n" * 3000
    opened.device.write(size - 3000, b"n" * 3000)
    opened.close()
    assert disk_bytes(path) == content
    assert check_image(path).findings == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_files_give_their_space_back(forge, layout):
    path = forge(**layout)
    resize_image(path, str(CHUNK * 2), FORCE)
    header = header_of(path)
    length = (path.parent / (header.data_file or path.name)).stat().st_size
    if header.is_compact:
        highest = max(v for k, v in layout["places"].items() if k < 2)
        assert length == header.data_offset + (highest + 1) * CHUNK
    else:
        assert length == header.data_offset + CHUNK * 2


@pytest.mark.parametrize("name", ["raw over a base", "compact over a base"])
def test_journal_is_replayed_first_and_emptied(forge, name):
    path = forge(**LAYOUTS[name])
    header = header_of(path)
    records = [BitmapRecord(0, 8)]
    if header.is_compact:
        records.append(TableRecord(1, 2, (7, 0xFFFFFFFF)))
        os.truncate(path, header.data_offset + 8 * CHUNK)
    put_records(path, header, 8, records)
    poke(path, 0, replace(header, clean_shutdown=0).pack())
    before = disk_bytes(path)
    resize_image(path, str(CHUNK * 4), FORCE)
    assert disk_bytes(path) == before[: CHUNK * 4]
    new = header_of(path)
    start = new.journal_offset
    assert not any(path.read_bytes()[start : start + new.journal_size])
    assert new.stable_journal_epoch == 2
    assert check_image(path).findings == []


def test_image_of_an_older_writer_gets_an_extension(forge):
    path = forge(filled=[0])
    header = header_of(path)
    poke(path, 0, replace(header, last_open_version=1).pack())
    resize_image(path, str(CHUNK), SHRINK)
    new = header_of(path)
    assert new.trusted_extension is not None
    assert new.extension.image_uuid != header.extension.image_uuid
    assert check_image(path).exit_status == 0


# Growing -----------------------------------------------------------------------------------


class Fault(Exception):
    """A fault as the engine raises it."""

    def __init__(self, number):
        super().__init__("resize the image: no")
        self.errno = number


@pytest.fixture
def engine(monkeypatch):
    """A module in the place of the compiled engine; `fails` is the errno of resize."""

    class Engine(types.ModuleType):
        EngineFault = Fault
        fails = 0
        calls: ClassVar[list] = []

    module = Engine("fvdcore")
    module.calls.clear()

    class Device:
        @staticmethod
        def open(layers, **options):
            module.calls.append(("open", options["read_only"], options["live_fd"]))
            return Device()

        def start(self):
            module.calls.append("start")

        def resize(self, size):
            module.calls.append(("resize", size))
            if module.fails:
                raise Fault(module.fails)

        def close(self):
            module.calls.append("close")

        def abandon(self):
            module.calls.append("abandon")

    module.Device = Device
    monkeypatch.setitem(sys.modules, "fvdcore", module)
    return module


def test_growing_opens_the_image_privately_and_grows_it(image, engine):
    poke(image, 8192 + 100, b"old copy")
    result = resize_image(image, "+1M")
    assert (result.old_size, result.new_size) == (1 << 20, 2 << 20)
    assert engine.calls == [("open", False, -1), "start", ("resize", 2 << 20), "close"]
    assert image.read_bytes()[8192:16384] == image.read_bytes()[:8192]


def test_the_real_engine_grows_raw_and_compact_images(tmp_path):
    for number, compact in enumerate((False, True)):
        path = tmp_path / f"{number}.fvd"
        create_image(path, CreateOptions(size=1 << 20, compact=compact))
        assert resize_image(path, "64G").new_size == 64 << 30
        assert header_of(path).virtual_disk_size == 64 << 30
        assert check_image(path).exit_status == 0


@pytest.mark.parametrize(
    ("number", "error"), [(28, NoSpace), (27, FileTooLarge), (5, EngineFailed)]
)
def test_fault_of_the_engine_is_handed_on(image, engine, digest, number, error):
    engine.fails = number
    before = digest(image)
    with pytest.raises(error):
        resize_image(image, "2M")
    assert engine.calls[-1] == "close"
    assert digest(image) == before
    open_plan(image).close()
