# SPDX-License-Identifier: Apache-2.0
"""An image that is held still under its own name, and gets it back."""

import errno
import os

import pytest

from fvdengine import overlay
from fvdengine.chain import read_header
from fvdengine.create import create_image
from fvdengine.errors import EngineError, HeldByBackup, NoSpace
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "web.fvd"
    create_image(path, CreateOptions(size=SIZE))
    path.chmod(0o640)
    return path


def base_of(image):
    return image.with_name("web.fvd.still")


def test_empty_image_takes_the_name_and_gives_it_back(image):
    base = base_of(image)
    before = image.stat()
    assert not overlay.is_over(str(image), str(base))
    overlay.put_over(str(image), str(base), CreateOptions())
    assert overlay.is_over(str(image), str(base))
    assert base.stat().st_ino == before.st_ino != image.stat().st_ino
    assert image.stat().st_mode == before.st_mode
    with open_plan(image, OpenOptions(read_only=True)) as plan:
        assert [layer.path for layer in plan.layers] == [str(image), str(base)]
        assert list(overlay.local_runs(plan.layers[0].fd, str(image), plan.header)) == []
    overlay.put_back(str(image), str(base))
    assert image.stat().st_ino == before.st_ino
    assert os.listdir(image.parent) == ["web.fvd"]


def test_upper_image_is_run_as_the_image_but_copies_nothing_up(tmp_path, image):
    clone = tmp_path / "clone.fvd"
    options = CreateOptions(
        base=str(image), base_format="fvd", copy_on_read=True, prefetch_delay_seconds=0,
        journal_period_ms=777, prefetch_max_read_kb=999_999,
    )  # fmt: skip
    create_image(clone, options)
    overlay.put_over(str(clone), str(clone) + ".still", CreateOptions())
    upper = overlay.header_of(str(clone))
    assert (upper.copy_on_read, upper.prefetch_start_delay) == (0, -1)
    assert (upper.journal_clean_buf_period, upper.prefetch_max_read_throughput) == (777, 999_999)


def test_base_may_be_written_while_it_is_one(image):
    base = base_of(image)
    overlay.put_over(str(image), str(base), CreateOptions())
    with open_plan(base):
        pass  # a session of its own, in which another clone would not know its base again
    with open_plan(image, OpenOptions(read_only=True)) as plan:
        assert len(plan.layers) == 2


def test_base_that_a_backup_left_is_not_opened_for_writing(image, tmp_path):
    base = tmp_path / ("web.fvd" + overlay.SUFFIX)
    overlay.put_over(str(image), str(base), CreateOptions())
    (tmp_path / "elsewhere").symlink_to(base)
    for name in (base, tmp_path / "elsewhere"):
        with pytest.raises(HeldByBackup, match=f"{name} is the base of {image}"):
            overlay.check_not_held(str(name))
    overlay.check_not_held(str(image))
    image.write_bytes(b"no image")
    overlay.check_not_held(str(base))
    image.unlink()
    overlay.check_not_held(str(base))


def test_name_in_use_is_refused_and_nothing_changes(image):
    base_of(image).write_text("somebody's")
    with pytest.raises(EngineError, match="exists"):
        overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    assert base_of(image).read_text() == "somebody's"
    assert not overlay.is_over(str(image), str(base_of(image)))
    with open_plan(image, OpenOptions(read_only=True)) as plan:
        assert len(plan.layers) == 1


def test_what_was_broken_off_before_the_new_image_was_there_begins_anew(image):
    base = base_of(image)
    os.link(image, base)
    base.with_name(base.name + overlay.FRESH).write_text("half of it")
    assert overlay.is_begun(str(image), str(base))
    overlay.put_over(str(image), str(base), CreateOptions())
    assert overlay.is_over(str(image), str(base))
    assert not overlay.is_begun(str(image), str(base))
    assert sorted(os.listdir(image.parent)) == ["web.fvd", base.name]


def full(*arguments):
    raise OSError(errno.ENOSPC, "no space")


@pytest.mark.parametrize("step", ["link", "_forget_identity", "rename", "flush_folder"])
def test_after_any_error_all_is_as_before(image, monkeypatch, step):
    before = image.stat().st_ino
    monkeypatch.setattr(os if hasattr(os, step) else overlay, step, full)
    with pytest.raises(NoSpace, match="still"):
        overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    assert image.stat().st_ino == before
    assert os.listdir(image.parent) == ["web.fvd"]


def test_image_that_cannot_have_its_name_back_is_named(image, monkeypatch):
    overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(NoSpace, match=str(image)):
        overlay.put_back(str(image), str(base_of(image)))
    assert overlay.is_over(str(image), str(base_of(image)))


def test_link_to_the_image_is_somebody_elses(image):
    os.symlink(image, base_of(image))
    assert not overlay.is_begun(str(image), str(base_of(image)))
    with pytest.raises(EngineError, match="exists"):
        overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    assert os.readlink(base_of(image)) == str(image)


def test_what_is_no_plain_file_is_refused(tmp_path):
    with pytest.raises(EngineError, match="plain"):
        overlay.put_over(str(tmp_path), str(tmp_path / "base"), CreateOptions())


def test_local_runs_are_those_of_the_image_alone(image):
    fd = os.open(image, os.O_RDONLY)
    try:
        header = read_header(fd, str(image))
        runs = list(overlay.local_runs(fd, str(image), header))
    finally:
        os.close(fd)
    assert [(run.start, run.length) for run in runs] == [(0, SIZE)]
