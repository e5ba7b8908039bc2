# SPDX-License-Identifier: Apache-2.0
"""Recording a boot profile: made, merged, refused, and never in the way."""

import os

import pytest

from fvdd.worker.recording import Recording
from fvdengine.errors import UnusableProfile
from fvdengine.profile import read_profile

PAGE = 4096


def test_a_recording_is_written_at_the_end_and_merged_with_the_next(tmp_path):
    path = tmp_path / "boot"
    Recording.open(str(path)).finish([(0, PAGE), (8 * PAGE, PAGE)])
    assert read_profile(path) == [(0, PAGE), (8 * PAGE, PAGE)]
    Recording.open(str(path)).finish([(4 * PAGE, PAGE)])
    assert read_profile(path) == [(0, PAGE), (4 * PAGE, PAGE), (8 * PAGE, PAGE)]


def test_what_was_never_finished_leaves_the_former_profile(tmp_path):
    path = tmp_path / "boot"
    Recording.open(str(path)).finish([(0, PAGE)])
    Recording.open(str(path)).close()
    assert read_profile(path) == [(0, PAGE)]


def test_another_file_is_refused_and_stays(tmp_path):
    path = tmp_path / "notes"
    path.write_text("dear diary\n")
    with pytest.raises(UnusableProfile, match="first line"):
        Recording.open(str(path))
    assert path.read_text() == "dear diary\n"


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "boot").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnusableProfile):
        Recording.open(str(tmp_path / "boot"))
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_path_nothing_happens():
    none = Recording.open("")
    none.finish([(0, PAGE)])
    none.close()


def test_a_full_disk_is_no_failure():
    recording = Recording("/dev/full", os.open("/dev/full", os.O_RDWR))
    recording.finish([(0, PAGE)])
    assert recording.fd == -1
