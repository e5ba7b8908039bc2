# SPDX-License-Identifier: Apache-2.0
"""A shrink that ends at any of its writes is finished or never happened, whoever comes next."""

import random
from dataclasses import replace

import pytest

from fvdengine import editing, intent, shrink
from fvdengine.check import check_image
from fvdengine.checkpoint import Files
from fvdengine.editing import ImageFile
from fvdengine.metadata import load_metadata
from fvdengine.opening import open_device, open_plan
from fvdengine.options import OpenOptions
from fvdengine.records import BitmapRecord
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import update_image
from fvdtest.forge import (
    BLOCK,
    CHUNK,
    Forged,
    Recorder,
    disk_bytes,
    every_crash,
    forge_image,
    header_of,
    poke,
    put_records,
)

SIZE = 1 << 18
NEW = CHUNK * 2 + 2560
FORCE = ResizeOptions(shrink=True, force=True)
ACCEPT = OpenOptions(accept_changed_base=True)
PLACES = {0: 4, 1: 0, 2: 7, 5: 2, 11: 5, 12: 1, 15: 6}

LAYOUTS = {
    "raw over a shorter base": {
        "base": SIZE - 3 * BLOCK - 512, "local": range(1, 60, 2), "filled": range(0, 64, 3),
    },
    "raw without a copy": {
        "base": SIZE - 512, "local": [3, 40, 61], "filled": range(64),
        "values": {"header_size": 8192},
    },
    "compact over a base": {"base": SIZE - 512, "places": PLACES, "local": range(1, 60)},
    "compact with a data file": {
        "base": BLOCK * 3, "places": {0: 4, 3: 2, 8: 1, 15: 0}, "data_file": "x.data",
    },
}  # fmt: skip


@pytest.fixture
def forge(tmp_path):
    """A function that makes c.fvd of one of the layouts, left with something to replay."""

    def make(base=0, **values):
        if base:
            values["base"] = tmp_path / "base.raw"
            values["base"].write_bytes(random.Random(3).randbytes(base))
        path = tmp_path / "c.fvd"
        header = forge_image(path, Forged(size=SIZE, **values))
        if base:
            put_records(path, header, 0, [BitmapRecord(8, 16)])
            poke(path, 0, replace(header, clean_shutdown=0).pack())
        return path

    return make


def files_of(path):
    return {str(p): p.read_bytes() for p in path.parent.iterdir() if p.suffix in (".fvd", ".data")}


def put(state):
    for file, data in state.items():
        with open(file, "wb") as target:
            target.write(data)


def open_and_close(path):
    with open_plan(path, ACCEPT) as plan:
        device = open_device(plan)
        try:
            assert device.size == plan.header.virtual_disk_size
        finally:
            device.close()


NEXT = {
    "open": open_and_close,
    "repair": lambda path: repair_image(path, ACCEPT),
    "resize": lambda path: resize_image(path, str(NEW), FORCE),
    "update": lambda path: update_image(path, {"prefetch_throttle_time": "77"}),
}


def states_of(path, monkeypatch, most):
    """What the files hold before a shrink, and after each crash in it."""
    before, steps = files_of(path), []
    with monkeypatch.context() as patched:
        for module in ("editing", "resize"):
            patched.setattr(
                f"fvdengine.{module}.ImageFile", lambda fd, name: Recorder(fd, name, steps)
            )
        resize_image(path, str(NEW), FORCE)
    return list(every_crash(before, steps, most))


@pytest.mark.parametrize("name", LAYOUTS)
def test_whoever_comes_next_finds_one_size_or_the_other(forge, name, monkeypatch):
    path = forge(**LAYOUTS[name])
    content = disk_bytes(path)[:NEW]
    sizes, way = [], 0
    for state in states_of(path, monkeypatch, 2):
        put(state)
        was_shrinking = intent.is_shrinking(header_of(path))
        way += 1
        if way % 4 and not was_shrinking:
            continue
        assert check_image(path, ACCEPT).exit_status in (0, 3)
        assert disk_bytes(path)[:NEW] == content
        for then in ("open", list(NEXT)[1 + way % 3])[way % 2 :]:
            put(state)
            NEXT[then](path)
            if then == "update":
                open_and_close(path)
            sizes.append(header_of(path).virtual_disk_size)
            assert not was_shrinking or sizes[-1] == NEW
            result = check_image(path, ACCEPT)
            assert result.exit_status in (0, 3), (then, [f.message for f in result.findings])
            assert "bitmap_padding" not in [f.code for f in result.findings]
            assert disk_bytes(path)[:NEW] == content
            mended = [a.code for a in repair_image(path, ACCEPT, dry_run=True).actions]
            assert set(mended) <= {"cut_file", "free_places", "replay"}
    assert set(sizes) == {SIZE, NEW}


@pytest.fixture
def halfway(forge):
    """A compact image whose shrink counts and has changed nothing else yet."""
    path = forge(places={0: 1, 1: 0}, base=SIZE, local=range(64))
    header = replace(header_of(path), clean_shutdown=0)
    extension = replace(header.extension, shrink_size=2 * CHUNK)
    poke(path, 0, replace(header, extension=extension).pack())
    return path


def test_readers_go_by_what_is_there_and_say_so(halfway):
    before = halfway.read_bytes()
    assert "shrinking" in [f.code for f in check_image(halfway, ACCEPT).findings]
    told = repair_image(halfway, ACCEPT, dry_run=True)
    assert "finish_shrink" in [action.code for action in told.actions]
    with open_plan(halfway, replace(ACCEPT, read_only=True)) as plan:
        device = open_device(plan)
        assert device.size == plan.header.virtual_disk_size == SIZE
        device.close()
    assert halfway.read_bytes() == before


def test_a_finish_that_is_cut_short_is_finished_as_well(halfway):
    before, steps = files_of(halfway), []
    content = disk_bytes(halfway)[: 2 * CHUNK]
    with editing.open_for_change(str(halfway)) as opened:
        file = Recorder(opened.fd, opened.path, steps)
        header = header_of(halfway)
        shrink.finish(
            Files(file, file), header, load_metadata(file.fd, header, file.path, file.length())
        )
    assert not intent.is_shrinking(header_of(halfway))
    for state in every_crash(before, steps, 3):
        put(state)
        open_and_close(halfway)
        assert header_of(halfway).virtual_disk_size == 2 * CHUNK
        assert header_of(halfway).base_img_size == 2 * CHUNK
        assert disk_bytes(halfway) == content
        assert check_image(halfway, ACCEPT).exit_status == 0


def test_the_end_may_be_moved_further_down_but_not_up(halfway):
    resize_image(halfway, "16k", FORCE)
    assert header_of(halfway).virtual_disk_size == CHUNK
    header = header_of(halfway)
    extension = replace(header.extension, shrink_size=SIZE)  # as no shrink writes it
    poke(halfway, 0, replace(header, extension=extension).pack())
    resize_image(halfway, "+16k", ResizeOptions(accept_changed_base=True))
    assert header_of(halfway).virtual_disk_size == 2 * CHUNK
    assert not intent.is_shrinking(header_of(halfway))


def test_what_is_refused_leaves_it_unfinished(halfway):
    before = halfway.read_bytes()
    for size in ("999", "8E"):
        with pytest.raises(Exception, match=r"multiple|larger"):
            resize_image(halfway, size, FORCE)
        assert halfway.read_bytes() == before


def test_an_older_writer_ends_it(halfway):
    header = header_of(halfway)
    poke(halfway, 0, replace(header, last_open_version=1).pack())
    open_and_close(halfway)
    assert header_of(halfway).virtual_disk_size == SIZE
    assert not intent.is_shrinking(header_of(halfway))


def test_the_sizes_are_written_one_after_the_other(halfway):
    steps = []
    with editing.open_for_change(str(halfway)) as opened:
        file = Recorder(opened.fd, opened.path, steps)
        new = shrink.write_sizes(Files(file, file), header_of(halfway))
    assert [(step[0], step[1]) for _, step in steps] == [
        ("write", 2048), ("flush", 0), ("write", 0), ("flush", 0)
    ]  # fmt: skip
    assert (new.base_img_size, new.virtual_disk_size) == (2 * CHUNK, 2 * CHUNK)
    assert isinstance(file, ImageFile)
