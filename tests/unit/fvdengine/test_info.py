# SPDX-License-Identifier: Apache-2.0
"""Info answers whatever is in the way: a missing base, a user, a dead process."""

import json
import os

import pytest

from fvdengine import chain
from fvdengine.create import create_image
from fvdengine.errors import NotAnImage
from fvdengine.info import image_info
from fvdengine.opening import open_plan
from fvdengine.options import CreateOptions
from fvdengine.records import BitmapRecord, Trailer, seal_sector


def test_clone_says_what_it_is(image, base):
    found = image_info(image)
    assert found.state == "clean"
    assert found.local_bytes == 0
    assert [(item.path, item.format, item.length) for item in found.bases] == [
        (str(base), "raw", 1 << 20)
    ]
    assert found.bases[0].problem is None
    assert found.used_by == []


def test_answer_is_plain_data(image):
    found = json.loads(json.dumps(image_info(image).as_dict()))
    assert found["size_bytes"] == 1 << 20
    assert found["header"]["block_size"] == 4096
    assert found["extension"]["base_kind"] == "file"
    assert set(found["header"]).isdisjoint({"incompatible_features", "magic"})


def test_chain_is_followed(image, tmp_path, base):
    create_image(tmp_path / "second.fvd", CreateOptions(base=str(image), base_format="fvd"))
    found = image_info(tmp_path / "second.fvd")
    assert [item.path for item in found.bases] == [str(image), str(base)]


def test_loop_of_bases_is_named_where_it_closes(image, tmp_path, change):
    create_image(tmp_path / "second.fvd", CreateOptions(base=str(image), base_format="fvd"))
    change(base_img="second.fvd", base_img_fmt="fvd")
    found = image_info(image)
    assert [item.name for item in found.bases] == ["second.fvd", "clone.fvd"]
    assert "comes back to" in found.bases[-1].problem


def test_missing_base_is_part_of_the_answer(image, base):
    base.unlink()
    (item,) = image_info(image).bases
    assert item.path is None
    assert "does not exist" in item.problem


def test_changed_base_is_part_of_the_answer(image, base):
    os.utime(base, ns=(1, 1))
    (item,) = image_info(image).bases
    assert "it was modified" in item.problem


def test_user_is_part_of_the_answer(image):
    with open_plan(image):
        found = image_info(image)
    assert found.state == "in use"
    assert [holder.pid for holder in found.used_by] == [os.getpid()]
    assert found.local_bytes is None


@pytest.mark.parametrize(
    ("boot", "state"), [(None, "left by a dead process"), (bytes(16), "not closed cleanly")]
)
def test_unclean_state_is_named(image, change, boot, state):
    change(clean_shutdown=0, ext_boot_id=chain.boot_id() if boot is None else boot)
    assert image_info(image).state == state


def test_damaged_journal_is_a_warning(image, change, header, poke):
    change(last_open_version=1)
    poke(header.journal_offset, b"junk")
    found = image_info(image)
    assert found.local_bytes is None
    assert any("journal" in warning for warning in found.warnings)


def test_file_that_is_no_image_is_refused(base):
    with pytest.raises(NotAnImage):
        image_info(base)


def test_info_changes_nothing(image, digest):
    before = digest(image)
    image_info(image)
    assert digest(image) == before


def test_image_in_raw_layout_has_no_chunks(image):
    found = image_info(image)
    assert (found.layout, found.chunks, found.mapped_chunks) == ("raw", 0, None)
    assert (found.metadata_memory, found.data) == (4096, None)
    assert found.compatible_features == ["journal_trailers"]
    assert found.extension_trust == "trusted"


def test_journal_that_waits_is_counted(image, header, change, poke):
    change(clean_shutdown=0)
    uuid = header.extension.image_uuid
    items = [BitmapRecord(0, 8), BitmapRecord(80, 24)]
    poke(header.journal_offset, seal_sector(items, Trailer(1, 1), uuid))
    poke(header.journal_offset + 4096, seal_sector(items, Trailer(1, 2), bytes(16)))
    found = image_info(image).journal
    assert (found.used_bytes, found.records, found.blocks, found.chunks, found.torn_sectors) == (
        512, 2, 4, 0, 1,
    )  # fmt: skip


def test_compact_image_with_a_data_file_says_so(tmp_path):
    path, data = tmp_path / "c.fvd", tmp_path / "c.data"
    header = create_image(
        path, CreateOptions(size=8 << 20, compact=True, data_file=str(data))
    ).header
    data.write_bytes(b"x" * (3 << 20))
    with path.open("r+b") as file:
        file.seek(header.table_offset + 4)
        file.write((2).to_bytes(4, "little"))
    found = image_info(path)
    assert (found.layout, found.chunks, found.mapped_chunks) == ("compact", 8, 1)
    assert (found.data.path, found.data.length, found.data.problem) == (str(data), 3 << 20, None)
    assert found.allocated_bytes >= (3 << 20) + header.journal_size
    assert json.loads(json.dumps(found.as_dict()))["data_file"]["format"] == "raw"


def test_missing_data_file_is_part_of_the_answer(tmp_path):
    options = CreateOptions(size=8 << 20, data_file=str(tmp_path / "c.data"))
    create_image(tmp_path / "c.fvd", options)
    (tmp_path / "c.data").unlink()
    assert "does not exist" in image_info(tmp_path / "c.fvd").data.problem


def test_damaged_table_is_a_warning(tmp_path):
    header = create_image(tmp_path / "c.fvd", CreateOptions(size=8 << 20, compact=True)).header
    with (tmp_path / "c.fvd").open("r+b") as file:
        file.seek(header.table_offset)
        file.write(bytes(8))
    found = image_info(tmp_path / "c.fvd")
    assert any("entry" in warning for warning in found.warnings)
    assert found.mapped_chunks is None


@pytest.mark.parametrize(
    ("values", "text"),
    [({"last_open_version": 1}, "older version"), ({"extension": None}, "missing or damaged")],
)
def test_extension_that_does_not_count_is_said_so(image, change, values, text):
    change(**values)
    found = image_info(image)
    assert text in found.extension_trust
    assert found.compatible_features == []


def test_used_data_file_of_a_used_image_is_no_problem(tmp_path):
    options = CreateOptions(size=8 << 20, data_file=str(tmp_path / "c.data"))
    create_image(tmp_path / "c.fvd", options)
    with open_plan(tmp_path / "c.fvd"):
        found = image_info(tmp_path / "c.fvd")
    assert (found.state, found.data.problem) == ("in use", None)
