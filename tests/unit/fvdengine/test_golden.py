# SPDX-License-Identifier: Apache-2.0
"""The golden images: made anew they are the same, and read they show what is written down."""

import hashlib
import json
import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.errors import EngineError
from fvdengine.header import Header
from fvdengine.info import image_info
from fvdengine.mapping import map_image
from fvdengine.metadata import Source, load_metadata, runs
from fvdengine.opening import OpenOptions, open_plan
from fvdtest import golden

SCRIPT = Path(golden.DIRECTORY).parent / "make_golden.py"
READ = OpenOptions(read_only=True)
CHAIN = "chain-of-two"


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """What the script makes today."""
    target = tmp_path_factory.mktemp("remade")
    subprocess.run([sys.executable, "-B", str(SCRIPT), "--into", str(target)], check=True)
    return target


def test_script_makes_what_is_stored(remade):
    stored = {path.name for path in golden.DIRECTORY.iterdir()}
    assert {path.name for path in remade.iterdir()} == stored
    assert (remade / "index.json").read_text() == (golden.DIRECTORY / "index.json").read_text()
    for name in stored - {"index.json"}:
        again = lzma.decompress((remade / name).read_bytes())
        assert again == golden.packed(name.removesuffix(".xz")), name


def test_golden_images_are_small():
    assert sum(path.stat().st_size for path in golden.DIRECTORY.iterdir()) < 512 << 10


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize("name", golden.names(refused=False))
def test_image_shows_what_is_written_down(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    before = digests(tmp_path)
    with open_plan(image.path, READ) as plan:
        content = load_content(plan.layers)
        found = content.read(0, image.size)
    if name != CHAIN:  # of which the runs tell the top layer alone
        assert found == image.content()
    assert digests(tmp_path) == before


@pytest.mark.parametrize("name", golden.names(refused=False))
def test_bytes_lie_where_is_written_down(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    with image.path.open("rb") as file:
        header = Header.unpack(file.read(8192))
        loaded = load_metadata(file.fileno(), header, name)
        found = [
            (run.start, run.length, run.source is Source.BASE, run.offset)
            for run in runs(loaded, header, 0, header.virtual_disk_size)
        ]
    expected = []
    for start, length, source, offset in image.runs:  # holes of a file are storage here
        item = (start, length, source == "base", offset)
        if expected and expected[-1][2] == item[2] and follows(expected[-1], item):
            expected[-1] = (*expected[-1][:1], expected[-1][1] + length, *expected[-1][2:])
        else:
            expected.append(item)
    assert merged(found) == expected


def follows(before, after):
    return after[3] == (before[3] + before[1] if before[3] >= 0 else -1)


def merged(items):
    result = []
    for item in items:
        if result and result[-1][2] == item[2] and follows(result[-1], item):
            result[-1] = (result[-1][0], result[-1][1] + item[1], *result[-1][2:])
        else:
            result.append(item)
    return result


def test_chain_of_two_takes_each_part_from_its_layer(tmp_path):
    image = golden.unpack(CHAIN, tmp_path)
    below = golden.unpack("compact-base-short-data-journal-large", tmp_path).content()
    expected = bytearray()
    for start, length, source, _ in image.runs:
        part = below[start : start + length]
        if source == "data":
            sectors = range(start // 512, (start + length) // 512)
            part = b"".join(golden.stamp("d", sector) for sector in sectors)
        expected += part
    with open_plan(image.path, READ) as plan:
        assert load_content(plan.layers).read(0, image.size) == expected


@pytest.mark.parametrize("name", golden.names(refused=False))
def test_image_is_mapped_and_described_and_found_sound(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    before = digests(tmp_path)
    extents = list(map_image(image.path))
    assert sum(extent.length for extent in extents) == image.size
    for extent in extents:
        part = image.content()[extent.start : extent.end]
        if "zero" in extent.kind.value and name != CHAIN:
            assert not part.strip(b"\0")
    assert json.loads(json.dumps(image_info(image.path).as_dict()))["warnings"] is not None
    result = check_image(image.path)
    assert result.exit_status == golden.index()[name]["facts"].get("check", 0), result.findings
    assert digests(tmp_path) == before


@pytest.mark.parametrize("name", golden.names(refused=True))
def test_image_is_refused_by_name(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    before = digests(tmp_path)
    for options in (READ, OpenOptions(), replace(READ, accept_changed_base=True)):
        with pytest.raises(EngineError) as caught:
            open_plan(image.path, options)
        assert caught.value.code == image.refused
    assert digests(tmp_path) == before
