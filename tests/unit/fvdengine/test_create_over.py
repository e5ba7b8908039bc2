# SPDX-License-Identifier: Apache-2.0
"""An image over one that is in use: made before its base is still, and judged when that is."""

import os
from dataclasses import replace

import pytest

from fvdengine.create import create_image, create_over, is_as_created
from fvdengine.errors import EngineError, ImageInUse
from fvdengine.header import Header
from fvdengine.opening import grow_device, open_plan
from fvdengine.options import CreateOptions, OpenOptions


@pytest.mark.parametrize("place", [".", "other"])
def test_image_over_one_in_use_is_the_one_that_would_be_made_later(tmp_path, image, place):
    (tmp_path / "other").mkdir()
    new = tmp_path / place / "new.fvd"
    options = CreateOptions(base=str(image), base_format="fvd", allow_dirs=(str(tmp_path),))
    with open_plan(image), pytest.raises(ImageInUse):
        is_as_created(Header.unpack(image.read_bytes(), ""), options)
    with open_plan(image):
        kept = []
        made = create_over(str(new), options, lambda fd: kept.append(os.dup(fd)))
        with pytest.raises(ImageInUse):
            open_plan(new)
    os.close(kept[0])
    assert Header.unpack(new.read_bytes(), "") == made
    assert is_as_created(made, options)
    later = create_image(tmp_path / place / "later.fvd", options).header
    assert is_as_created(later, options)
    assert later.base_img == made.base_img
    with open_plan(new, OpenOptions(allow_dirs=options.allow_dirs)) as plan:
        assert plan.warnings == []


@pytest.mark.parametrize("change", ["session and size", "like"])
def test_image_over_one_that_was_changed_meanwhile_is_not_the_one(tmp_path, image, change):
    options = CreateOptions(base=str(image), base_format="fvd")
    made = create_over(str(tmp_path / "new.fvd"), options, lambda fd: None)
    assert is_as_created(made, options)
    header = Header.unpack(image.read_bytes(), "")
    if change == "like":
        options = replace(options, like=replace(header, num_prefetch_slots=7))
    else:
        with open_plan(image) as plan:
            grow_device(plan, header.virtual_disk_size + (1 << 20))
    assert not is_as_created(made, options)


def test_nothing_is_left_of_an_image_over_another_that_fails(tmp_path, image):
    def fail(fd):
        raise InterruptedError(4, "stopped")

    with pytest.raises(EngineError, match="Interrupted"):
        create_over(
            str(tmp_path / "new.fvd"), CreateOptions(base=str(image), base_format="fvd"), fail
        )
    assert not (tmp_path / "new.fvd").exists()
