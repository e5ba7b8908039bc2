# SPDX-License-Identifier: Apache-2.0
"""An image that is held still under its own name, and gets it back."""

import os

import pytest

from fvdengine import overlay
from fvdengine.chain import read_header
from fvdengine.create import create_image
from fvdengine.errors import EngineError
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


def test_base_may_be_written_while_it_is_one(image):
    base = base_of(image)
    overlay.put_over(str(image), str(base), CreateOptions())
    with open_plan(base):
        pass  # a session of its own, in which another clone would not know its base again
    with open_plan(image, OpenOptions(read_only=True)) as plan:
        assert len(plan.layers) == 2


def test_name_in_use_is_refused_and_nothing_changes(image):
    base_of(image).write_text("somebody's")
    with pytest.raises(EngineError, match="exists"):
        overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    assert base_of(image).read_text() == "somebody's"
    assert not overlay.is_over(str(image), str(base_of(image)))
    with open_plan(image, OpenOptions(read_only=True)) as plan:
        assert len(plan.layers) == 1


def test_what_is_no_plain_file_is_refused(tmp_path):
    with pytest.raises(EngineError, match="plain"):
        overlay.put_over(str(tmp_path), str(tmp_path / "base"), CreateOptions())


def test_failure_half_way_leaves_everything_as_it_was(image, monkeypatch):
    def fails(path):
        raise OSError(28, "no space")

    monkeypatch.setattr(overlay, "_forget_identity", fails)
    with pytest.raises(OSError, match="no space"):
        overlay.put_over(str(image), str(base_of(image)), CreateOptions())
    assert os.listdir(image.parent) == ["web.fvd"]


def test_local_runs_are_those_of_the_image_alone(image):
    fd = os.open(image, os.O_RDONLY)
    try:
        header = read_header(fd, str(image))
        runs = list(overlay.local_runs(fd, str(image), header))
    finally:
        os.close(fd)
    assert [(run.start, run.length) for run in runs] == [(0, SIZE)]
