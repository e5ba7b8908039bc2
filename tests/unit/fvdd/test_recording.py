# SPDX-License-Identifier: Apache-2.0
"""Recording a boot profile: made, merged, refused, and never in the way."""

import os

import pytest

from fvdd.worker.recording import Recording
from fvdengine.errors import UnusableProfile
from fvdengine.profile import ENTRIES_MAX, read_profile
from fvdtest.tools import wait_until

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


def test_what_was_noted_survives_a_kill_and_goes_on_in_its_order(tmp_path):
    path = tmp_path / "boot"
    Recording.open(str(path)).finish([(0, PAGE)])
    killed = Recording.open(str(path))
    reads = [(9 * PAGE, PAGE), (7 * PAGE, PAGE)]
    killed.note([])
    killed.note(reads)
    killed.note([*reads, (5 * PAGE, PAGE)])
    killed.note([*reads, (5 * PAGE, 2 * PAGE)])  # the last one grows: it is not noted yet
    assert read_profile(path) == [(0, PAGE), *reads]
    after = Recording.open(str(path), goes_on=True)
    after.note([(3 * PAGE, PAGE), (PAGE, PAGE)])
    assert read_profile(path) == [(0, PAGE), *reads, (3 * PAGE, PAGE)]
    after.finish([(3 * PAGE, PAGE), (PAGE, PAGE)])
    assert read_profile(path) == [(0, PAGE), *reads, (3 * PAGE, PAGE), (PAGE, PAGE)]
    killed.close()


def test_a_line_that_a_crash_cut_is_no_obstacle(tmp_path):
    path = tmp_path / "boot"
    path.write_bytes(b"fvd-profile 1\n0 4096\n8192\0\0")
    again = Recording.open(str(path))
    again.note([(9 * PAGE, PAGE), (0, PAGE)])
    assert read_profile(path) == [(0, PAGE), (9 * PAGE, PAGE)]
    again.close()


def test_no_more_is_noted_than_a_profile_may_hold(tmp_path):
    path = tmp_path / "boot"
    recording = Recording.open(str(path))
    recording.note([(at * PAGE, PAGE) for at in range(ENTRIES_MAX + 9)])
    assert len(read_profile(path)) == ENTRIES_MAX
    recording.close()


def test_reads_are_noted_while_the_recording_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("fvdd.worker.recording.NOTE_SECONDS", 0.001)
    path = tmp_path / "boot"
    recording = Recording.open(str(path))
    recording.start(lambda: [(PAGE, PAGE), (0, PAGE)])
    wait_until(path.read_text, "the first line")
    recording.finish([(PAGE, PAGE), (0, PAGE)])
    assert read_profile(path) == [(PAGE, PAGE), (0, PAGE)]
    assert recording.thread is not None
    assert not recording.thread.is_alive()


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
