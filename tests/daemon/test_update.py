# SPDX-License-Identifier: Apache-2.0
"""How an image is run changes while its device is in use: all of the fields given, or none."""

import json
import os
import signal

import pytest

from fvdapi.errors import ApiError
from fvdapi.models import UpdateRequest
from fvdengine.header import Header
from fvdtest.daemon import wait_until


def header_of(image):
    with image.open("rb") as file:
        return Header.unpack(file.read(8192))


def test_fields_change_and_say_when_they_count(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    words = ("journal_clean_buf_period=50", "copy_on_read=on", "num_prefetch_slots=4")
    assert daemon.ctl("update", "web", *words).stdout.splitlines() == [
        "journal_clean_buf_period: 5000 -> 50",
        "copy_on_read: 0 -> 1",
        "num_prefetch_slots: 2 -> 4 (when it is opened next)",
    ]
    disk.read(0, 1 << 20)
    wait_until(lambda: daemon.device("web").local_bytes >= 1 << 20, "what was read to be local")
    # Said again, and by the image's path: nothing is left to change.
    assert daemon.ctl("update", image, *words).stdout == "nothing to change\n"
    header = header_of(image)
    assert (header.journal_clean_buf_period, header.copy_on_read) == (50, 1)
    assert header.num_prefetch_slots == 4
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("detach", "web")
    assert daemon.ctl("check", image).returncode == 0


def test_change_outlives_the_worker(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    report = json.loads(daemon.ctl("update", "web", "journal_buf_size=4k", "--json").stdout)
    assert report == {
        "name": "web", "device": "/dev/nbd0",
        "changes": {"journal_buf_size": {"old": 4 << 20, "new": 4096}}, "next_open": [],
    }  # fmt: skip
    pid = daemon.device("web").worker_pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").worker_pid not in (pid, None), "the successor")
    assert model.difference(disk.read(0, model.size)) is None
    assert header_of(image).journal_buf_size == 4096
    answer = daemon.ctl("update", "web", "journal_buf_size=8k", "prefetch_start_delay=7").stdout
    assert "journal_buf_size: 4096 -> 8192" in answer
    assert "prefetch_start_delay: -1 -> 7 (when it is opened next)" in answer


def test_what_was_decided_at_attach_stays_until_the_next(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image, "--no-copy-on-read")
    done = daemon.ctl("update", "web", "copy_on_read=on")
    assert done.stdout == "copy_on_read: 0 -> 1 (when it is opened next)\n"
    disk.read(0, 1 << 20)
    disk.flush()
    assert daemon.device("web").local_bytes == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("copy_on_read=on", "base_img=other.raw"), 1, "base_img cannot change while"),
        (("copy_on_read=on", "need_zero_init=off"), 1, "need_zero_init cannot change while"),
        (("copy_on_read=on", "add_storage_cmd=true"), 1, "add_storage_cmd cannot change while"),
        (("copy_on_read=on", "num_prefetch_slots=99"), 1, "num_prefetch_slots cannot be '99'"),
        (("copy_on_read=on", "journal_buf_size=32M"), 1, "journal_buf_size"),
        (("copy_on_read=on", "prefetch_max_read_throughput=1"), 1, "prefetch_max_read_throughput"),
        (("copy_on_read=on", "virtual_disk_size=1G"), 1, "fvdctl resize"),
        (("copy_on_read=on", "colour=red"), 1, "no field"),
        (("copy_on_read=on", "--unsafe"), 1, "--unsafe is only for images that nobody uses"),
    ],
)
def test_one_bad_field_refuses_them_all(daemon, clone, words, status, message):
    image, _ = clone()
    daemon.attach(image)
    before = image.read_bytes()[:16384]
    done = daemon.ctl("update", "web", *words, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert image.read_bytes()[:16384] == before


def test_read_only_and_unknown_devices_are_refused(daemon, clone):
    image, _ = clone()
    daemon.attach(image, "-r")
    before = image.read_bytes()
    done = daemon.ctl("update", "web", "copy_on_read=on", check=False)
    assert done.returncode == 1
    assert "read-only" in done.stderr
    assert image.read_bytes() == before
    assert daemon.ctl("update", "nobody", "copy_on_read=on", check=False).returncode == 4
    with daemon.client() as client, pytest.raises(ApiError, match="no device called"):
        client.update("nobody", UpdateRequest(fields={"copy_on_read": "on"}))
