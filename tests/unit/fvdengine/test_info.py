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


def test_missing_base_is_part_of_the_answer(image, base):
    base.unlink()
    (item,) = image_info(image).bases
    assert item.path is None
    assert "does not exist" in item.problem


def test_changed_base_is_part_of_the_answer(image, base):
    os.utime(base, ns=(1, 1))
    (item,) = image_info(image).bases
    assert "modified later" in item.problem


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
