# SPDX-License-Identifier: Apache-2.0
"""Which of two headers is right: damage never looks like a shrink that was cut short."""

from dataclasses import replace

import pytest

from fvdengine import editing
from fvdengine.errors import HeadersDisagree
from fvdengine.repair import repair_image
from fvdengine.two_headers import disagreement, restored
from fvdtest.forge import CHUNK, Forged, forge_image, header_of, poke


@pytest.fixture
def front(tmp_path):
    """The header of an image over a base whose shrink from 256 to 128 KiB was cut short."""
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(12 * CHUNK))
    path = tmp_path / "c.fvd"
    header = forge_image(path, Forged(size=16 * CHUNK, base=base))
    extension = replace(header.extension, shrink_size=8 * CHUNK)
    header = replace(header, clean_shutdown=0, extension=extension)
    poke(path, 0, header.pack())
    return path, header


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, []),
        ({"base_img_size": 8 * CHUNK}, []),
        ({"base_img_size": 8 * CHUNK, "virtual_disk_size": 8 * CHUNK}, []),
        ({"base_img_size": 7 * CHUNK}, ["base_img_size"]),
        ({"virtual_disk_size": 17 * CHUNK}, ["virtual_disk_size"]),
        ({"block_size": 8192}, ["block_size"]),
    ],
    ids=str,
)
def test_a_shrink_explains_its_own_sizes_and_no_others(front, values, fields):
    path, header = front
    with editing.open_for_change(str(path)) as file:
        assert disagreement(file.fd, file.path, replace(header, **values)) == fields


@pytest.mark.parametrize("name", ["base_img_size", "virtual_disk_size"])
def test_without_the_word_for_it_smaller_sizes_are_damage(front, name):
    path, header = front
    plain = replace(header, extension=replace(header.extension, shrink_size=0))
    damaged = replace(plain, **{name: 12 * CHUNK - 512})
    poke(path, 0, damaged.pack())
    before = path.read_bytes()
    if name == "virtual_disk_size":
        damaged = replace(damaged, base_img_size=12 * CHUNK - 512)
        poke(path, 0, damaged.pack())
        before = path.read_bytes()
    with pytest.raises(HeadersDisagree, match=name):
        repair_image(path)
    assert path.read_bytes() == before


def test_a_lost_page_comes_back_at_the_size_that_the_shrink_goes_to(front):
    path, header = front
    raw = bytes(512) + header.pack()[512:]
    found, _ = restored(raw, replace(header, extension=replace(header.extension, shrink_size=0)))
    assert found.extension.shrink_size == 8 * CHUNK
    poke(path, 0, bytes(512))
    result = repair_image(path)
    assert "finish_shrink" in [action.code for action in result.actions]
    assert result.exit_status == 0
    assert header_of(path).virtual_disk_size == header_of(path).base_img_size == 8 * CHUNK
    assert header_of(path).extension.shrink_size == 0
