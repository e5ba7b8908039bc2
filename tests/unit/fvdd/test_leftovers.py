# SPDX-License-Identifier: Apache-2.0
"""What broken off operations leave is told apart from what is needed, and from what is not ours."""

import fcntl
import os

import pytest

from fvdd.devices.leftovers import STALE_SECONDS, find_leftovers, remove_leftover
from fvdengine import overlay
from fvdengine.create import create_image
from fvdengine.options import CreateOptions


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "web.fvd"
    create_image(str(path), CreateOptions(size=1 << 20))
    return str(path)


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    for name in ("device.json", "live", "stats", "control.sock", "live.of-1-2"):
        (folder / name).touch()
    return folder


def old(path):
    os.utime(path, (1, 1))


def found(place, image, begun=None):
    return {
        os.path.basename(one.path): one.is_ours for one in find_leftovers(place, image, begun)
    }


def test_what_is_needed_is_no_leftover(place, image):
    for path in place.iterdir():
        old(path)
    overlay.put_over(image, image + overlay.SUFFIX, CreateOptions(base=image, base_format="fvd"))
    assert found(place, image) == {}


def test_files_that_were_to_replace_others_are_ours_once_they_are_old(place, image):
    names = ("device.json.new", "live.new", "live.reserved", "control.sock.01234567")
    for name in names:
        (place / name).touch()
    assert found(place, image) == {}
    for name in names:
        stamp = (place / name).stat().st_mtime - STALE_SECONDS - 1
        os.utime(place / name, (stamp, stamp))
    assert found(place, image) == dict.fromkeys(names, True)


def test_what_nobody_of_us_made_is_named_and_never_removed(place, image):
    (place / "notes.txt").write_text("mine")
    old(place / "notes.txt")
    (one,) = find_leftovers(place, image, None)
    assert one.remedy.endswith(f"rm {place}/notes.txt")
    assert not remove_leftover(one)
    assert (place / "notes.txt").read_text() == "mine"


def test_second_name_of_the_image_goes_and_the_image_stays(place, image):
    os.link(image, image + overlay.SUFFIX)
    (one,) = find_leftovers(place, image, None)
    assert "second name" in one.text
    assert remove_leftover(one)
    assert os.path.exists(image)
    assert found(place, image) == {}


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.mkdir()])
def test_foreign_file_under_the_name_that_backups_need_is_named(place, image, tmp_path, make):
    make(tmp_path / "web.fvd.backup-base")
    (one,) = find_leftovers(place, image, None)
    assert "none can be made" in one.text
    assert not remove_leftover(one)


def test_image_of_a_backup_that_was_not_in_use_yet_goes(place, image, tmp_path):
    fresh = tmp_path / "web.fvd.backup-base.new"
    fresh.touch()
    (one,) = find_leftovers(place, image, None)
    assert remove_leftover(one)
    assert not fresh.exists()
    fresh.mkdir()
    (one,) = find_leftovers(place, image, None)
    assert not remove_leftover(one)
    assert fresh.exists()


def test_image_that_a_snapshot_began_is_named_while_it_stands_over_the_device_s_own(
    place, image, tmp_path
):
    begun = str(tmp_path / "new.fvd")
    assert found(place, image, begun) == {}  # it got no further
    create_image(begun, CreateOptions(base=image, base_format="fvd"))
    assert found(place, image, begun) == {"new.fvd": False}
    os.truncate(begun, 100)
    assert found(place, image, begun) == {"new.fvd": False}
    (told,) = find_leftovers(place, image, begun)
    assert "unless it is a file of somebody's own" in told.text
    os.unlink(begun)
    create_image(begun, CreateOptions(size=1 << 20))  # another one by now
    assert found(place, image, begun) == {}


def test_file_of_a_backup_is_removed_unless_somebody_writes_it(place, image, tmp_path):
    part = tmp_path / "copy.raw.fvd.part"
    assert find_leftovers(place, image, None, str(part)) == []
    with part.open("wb") as file:
        (told,) = find_leftovers(place, image, None, str(part))
        assert told.text == f"{part} was begun by a backup of {image} that was broken off"
        assert "doctor --reclaim" in told.remedy
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not remove_leftover(told)
    assert remove_leftover(told)
    assert not part.exists()


def test_state_that_is_gone_is_no_error(tmp_path):
    assert find_leftovers(tmp_path / "none", str(tmp_path / "none.fvd"), None) == []
