# SPDX-License-Identifier: Apache-2.0
"""The golden images and the table of bad ones, opened with the engine."""

import contextlib
import errno
import hashlib
import itertools
import os

import pytest

from fvdcore import Device, EngineFault
from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.errors import EngineError
from fvdengine.mapping import map_image
from fvdengine.opening import OpenOptions, open_plan
from fvdtest import golden
from fvdtest.bad_images import BAD_IMAGES
from fvdtest.images import open_image

NAMES = golden.names(refused=False)
CHAIN = "chain-of-two"


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def shown(path):
    """What the files alone say, read without the engine."""
    with open_plan(path, OpenOptions(read_only=True)) as plan:
        return load_content(plan.layers).read(0, plan.header.virtual_disk_size)


def runs(extents):
    """[(length, is zero)], neighbours joined: what base:allocation and `fvdctl map` agree on."""
    found = []
    for is_zero, group in itertools.groupby(extents, lambda extent: extent[1]):
        found.append((sum(length for length, _ in group), is_zero))
    return found


@pytest.fixture
def unpacked(request, tmp_path):
    """(path, content) of a golden image."""
    image = golden.unpack(request.param, tmp_path)
    return image.path, shown(image.path) if request.param == CHAIN else image.content()


every = pytest.mark.parametrize("unpacked", NAMES, indirect=True)


@every
def test_a_reader_sees_it_and_changes_nothing(unpacked, tmp_path):
    path, content = unpacked
    before = digests(tmp_path)
    opened = open_image(path, read_only=True)
    try:
        assert opened.device.read(0, opened.device.size) == content
        extents = opened.device.block_status(0, opened.device.size)
        assert sum(length for length, _ in extents) == len(content)
        told = runs((length, kind.endswith("zero")) for length, kind in extents)
        mapped = runs((found.length, found.as_dict()["zero"]) for found in map_image(path))
        assert told == mapped
    finally:
        opened.close()
    assert digests(tmp_path) == before


@every
def test_after_a_writable_open_and_close_it_is_in_order_and_shows_the_same(unpacked):
    path, content = unpacked
    opened = open_image(path)
    try:
        assert opened.device.read(0, opened.device.size) == content
    finally:
        opened.close()
    assert check_image(path).exit_status == 0
    assert shown(path) == content
    opened = open_image(path)
    assert opened.device.read(0, opened.device.size) == content
    opened.close()


@every
def test_it_can_be_written_everywhere(unpacked, rng):
    """Odd ranges all over, with a death between: then all of it, from the files alone."""
    path, content = unpacked
    model = bytearray(content)
    for turn in range(2):
        opened = open_image(path)
        for _ in range(12):
            at = rng.randrange(len(model))
            data = rng.randbytes(min(rng.choice([1, 512, 4096, 9000]), len(model) - at))
            opened.device.write(at, data)
            model[at : at + len(data)] = data
        if turn == 0:
            opened.device.flush()
            opened.abandon()
    assert opened.device.read(0, opened.device.size) == model
    opened.close()
    assert shown(path) == model
    assert check_image(path).exit_status == 0


# What the engine never sees: it is given open files and their kinds, by whoever read the names.
NAMES = {
    "nbd without a name", "base format unknown", "data format unknown",
    "data file without an end", "command without an end",
}  # fmt: skip
ENGINE = [
    name for name, case in BAD_IMAGES.items() if case.stage != "files" and name not in NAMES
]


@pytest.fixture
def bad(request, tmp_path):
    """The path of a bad image; nothing of its files may change."""
    path = BAD_IMAGES[request.param].make(tmp_path)
    before = digests(tmp_path)
    yield path
    assert digests(tmp_path) == before


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("bad", BAD_IMAGES, indirect=True)
def test_a_bad_image_is_refused_and_left_as_it_is(bad, read_only):
    with pytest.raises((EngineError, EngineFault)):
        open_image(bad, read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("bad", ENGINE, indirect=True)
def test_a_bad_image_is_refused_by_the_engine_itself(bad, read_only):
    """Nobody else looks at table and journal; and what the header says holds without others."""
    with contextlib.ExitStack() as stack:

        def descriptor(path):
            fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
            stack.callback(os.close, fd)
            return fd

        data = bad.with_suffix(".data")
        top = (descriptor(bad), "fvd", *([descriptor(data)] if data.exists() else []))
        bases = [(descriptor(path), "raw") for path in sorted(bad.parent.glob("base-*.raw"))]
        with pytest.raises(EngineFault) as caught:
            Device.open([top, *bases], read_only=read_only)
        assert caught.value.errno == errno.EUCLEAN
