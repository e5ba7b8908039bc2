# SPDX-License-Identifier: Apache-2.0
"""The record of a device: what was stored is read again; anything else is refused in words."""

import json
import math
import os

import pytest

from fvdapi.models import AttachRequest, Timeouts
from fvdd.devices.record import (
    RECORD_BYTES_MAX,
    DeviceRecord,
    load_record,
    remove_directory,
    store_record,
)

RECORD = DeviceRecord(
    name="web",
    attachment="00000000-0000-0000-0000-000000000001",
    request=AttachRequest(image="/srv/web.fvd", connections=2, allow_dirs=("/srv",)),
    timeouts=Timeouts(resend_timeout=2, base_timeout=60, kernel_timeout=0, dead_timeout=7),
    attached_at=1.5,
    index=3,
    device="/dev/nbd3",
)


def test_record_comes_back_whole(tmp_path):
    store_record(tmp_path, RECORD)
    assert load_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
    assert RECORD.backend == "fvd:web:00000000-0000-0000-0000-000000000001"


def test_record_is_replaced_as_a_whole(tmp_path):
    store_record(tmp_path, RECORD)
    store_record(tmp_path, RECORD.model_copy(update={"worker_pid": 77}))
    assert load_record(tmp_path).worker_pid == 77


def test_names_that_are_no_text_come_back_whole(tmp_path):
    name = os.fsdecode(b"/srv/w\xe9b.fvd")
    request = RECORD.request.model_copy(update={"image": name, "allow_dirs": (name, "/srv")})
    record = RECORD.model_copy(update={"request": request, "kept": request, "begun": f"{name}.new"})
    store_record(tmp_path, record)
    assert load_record(tmp_path) == record


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("", "damaged"),
        ("{", "damaged"),
        ("{}", "damaged"),
        (json.dumps({**RECORD.model_dump(mode="json"), "version": 99}), "has version 99"),
        ("\0" * 4096, "damaged"),
        ("[" * 200_000, "damaged"),
        (" " * RECORD_BYTES_MAX + RECORD.model_dump_json(), "damaged"),
        ("\ud800", "damaged"),
    ],
    ids=["missing", "empty", "cut", "nothing", "newer", "zeros", "deep", "huge", "half"],
)
def test_what_is_no_record_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "device.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=words):
        load_record(tmp_path)


# Values that a field must not have: they would lead elsewhere, or no answer could show them.
WRONG = {
    "name": [7, None],
    "attachment": ["", "x", "0" * 500, 1],
    "request": [
        None, [], {}, {"image": "relative"}, {"image": "/a\0b"}, {"image": "/a/" + "b" * 5000},
    ],
    "timeouts": [None, {}, dict.fromkeys(Timeouts.model_fields, -1), dict.fromkeys(
        Timeouts.model_fields, 1e300), dict.fromkeys(Timeouts.model_fields, math.nan)],
    "attached_at": [-1, 1e300, math.inf, math.nan, "soon"],
    "index": [-1, 1 << 20, 10**30, 1.5, "x"],
    "device": ["/dev/sda", "nbd0", "/dev/nbd0/../sda", 7],
    "size_bytes": [-1, 1 << 63, math.inf],
    "flags": [-1, 1 << 16],
    "worker_pid": [-1, 10**30],
    "image_uuid": ["", "x" * 32],
    "image_id": [[1], [1, 2, 3], [-1, 2], [1, 10**30], "ab"],
    "wanted": ["", "gone", None],
    "prefetch": ["faster"],
    "kept": [[], {"image": "relative"}],
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_values_that_cannot_be_are_refused(tmp_path, field):
    stored = RECORD.model_dump(mode="json")
    for value in WRONG[field]:
        (tmp_path / "device.json").write_text(json.dumps({**stored, field: value}))
        with pytest.raises(ValueError, match="is damaged"):
            load_record(tmp_path)


def test_what_a_later_daemon_has_added_is_no_obstacle(tmp_path):
    stored = RECORD.model_copy(update={"kept": RECORD.request}).model_dump(mode="json")
    for part in (stored, stored["request"], stored["kept"], stored["timeouts"]):
        part["of_later"] = {"any": 1}
    (tmp_path / "device.json").write_text(json.dumps(stored))
    assert load_record(tmp_path) == RECORD.model_copy(update={"kept": RECORD.request})


def test_pipe_in_the_place_of_the_record_makes_nobody_wait(tmp_path):
    os.mkfifo(tmp_path / "device.json")
    with pytest.raises(ValueError, match="not a plain file"):
        load_record(tmp_path)


def test_link_in_the_place_of_the_record_is_not_followed(tmp_path):
    store_record(tmp_path, RECORD)
    (tmp_path / "device.json").rename(tmp_path / "elsewhere")
    (tmp_path / "device.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be read"):
        load_record(tmp_path)


def test_directory_with_something_foreign_is_left_and_told(tmp_path, caplog):
    (tmp_path / "web/folder").mkdir(parents=True)
    remove_directory(tmp_path / "web")
    assert (tmp_path / "web/folder").is_dir()
    assert "cannot be removed" in caplog.text


def test_directory_is_removed_with_its_files(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    store_record(folder, RECORD)
    (folder / "live").touch()
    remove_directory(folder)
    assert not folder.exists()
    remove_directory(folder)
