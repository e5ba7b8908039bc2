# SPDX-License-Identifier: Apache-2.0
"""Upkeep of the golden images: whatever their features, only what was asked for changes."""

import pytest

from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.errors import EngineError
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import update_image
from fvdtest import golden

READ = OpenOptions(read_only=True)
NAMES = golden.names(refused=False)


def shown(path):
    with open_plan(path, READ) as plan:
        return load_content(plan.layers).read(0, plan.header.virtual_disk_size)


@pytest.mark.parametrize("name", NAMES)
def test_repair_settles_it_and_keeps_every_byte(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    before, content = image.path.read_bytes(), shown(image.path)
    told = repair_image(image.path, dry_run=True)
    assert image.path.read_bytes() == before
    done = repair_image(image.path)
    assert done.actions == told.actions
    assert shown(image.path) == content
    assert (check_image(image.path).exit_status, repair_image(image.path).actions) == (0, [])


@pytest.mark.parametrize("name", NAMES)
def test_update_changes_one_field(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    content = shown(image.path)
    result = update_image(image.path, {"num_prefetch_slots": "5", "copy_on_read": "on"})
    assert set(result.changes) <= {"num_prefetch_slots", "copy_on_read"}
    assert result.header.num_prefetch_slots == 5
    assert shown(image.path) == content


@pytest.mark.parametrize("part", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_shrinking_by_force_keeps_what_is_before(tmp_path, name, part):
    image = golden.unpack(name, tmp_path)
    content = shown(image.path)
    size = len(content) * part // 6 // 512 * 512
    resize_image(image.path, str(size), ResizeOptions(shrink=True, force=True))
    assert shown(image.path) == content[:size]
    assert check_image(image.path).exit_status == 0


@pytest.mark.parametrize("name", golden.names(refused=True))
def test_what_cannot_be_opened_is_changed_by_nobody(tmp_path, name):
    image = golden.unpack(name, tmp_path)
    before = image.path.read_bytes()
    for change in (
        lambda path: update_image(path, {"copy_on_read": "on"}),
        lambda path: resize_image(path, "512", ResizeOptions(shrink=True, force=True)),
    ):
        with pytest.raises(EngineError):
            change(image.path)
        assert image.path.read_bytes() == before
