# SPDX-License-Identifier: Apache-2.0
"""Every bad input that concerns images: one sentence, a remedy, a status, no byte changed.

Each case is tried with each verb that opens the image, and the check sums of all files of the
directory are compared. `check` answers with its own statuses and prints what it found on stdout.
"""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvdctl.main import main
from fvdengine import chain
from fvdengine.errors import EngineError
from fvdengine.opening import OpenOptions, open_plan

from .conftest import ENVIRONMENT, digests, running

OPEN_AND_WAIT = """
import sys
from fvdengine.opening import OpenOptions, open_plan
plan = open_plan(sys.argv[1], OpenOptions(read_only=len(sys.argv) > 2))
print("open", flush=True)
sys.stdin.read()
"""


def write_at(offset, data):
    def damage(place, edit):
        with (place / "clone.fvd").open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def change(**values):
    return lambda place, edit: edit(**values)


def replace_with(data):
    return lambda place, edit: (place / "clone.fvd").write_bytes(data)


def cut_to(size):
    def damage(place, edit):
        length = (place / "clone.fvd").stat().st_size
        os.truncate(place / "clone.fvd", size if size >= 0 else length + size)

    return damage


def on_base(action):
    return lambda place, edit: action(place / "base.raw")


def link_base_outside(place, edit):
    (place / "base.raw").unlink()
    (place / "base.raw").symlink_to("/etc/passwd")


# id: damage, status of check, words of the sentence, words of the hint
CASES = {
    "no FVD file": (replace_with(b"#!/bin/sh\n" * 2000), 1, "not an FVD image", "create"),
    "empty file": (replace_with(b""), 1, "is empty", "create"),
    "wrong magic": (write_at(0, b"FWD\0"), 2, "magic", "--repair"),
    "header cut": (cut_to(5000), 2, "cut short: 5000 bytes", "copy"),
    "data cut": (cut_to(-1), 2, "cut short", "copy"),
    "only the header left": (cut_to(16384), 2, "cut short", "copy"),
    "unknown feature": (write_at(3344 + 5, b"\4"), 1, "feature bit 42 is set", "newer"),
    "older wiki layout": (change(header_size=1), 1, "older wiki layout", "Convert"),
    "odd header size": (change(header_size=8193), 2, "header_size", "check"),
    "size 0": (change(virtual_disk_size=0), 2, "virtual_disk_size is 0", "check"),
    "odd size": (change(virtual_disk_size=1000), 2, "not a multiple of 512", "check"),
    "sections overlap": (change(journal_offset=16384), 2, "overlaps", "check"),
    "section in the header": (change(bitmap_offset=4096), 2, "overlaps the header", "check"),
    "section out of the file": (change(journal_offset=1 << 50), 2, "outside the file", "check"),
    "section not aligned": (change(bitmap_offset=16896), 2, "multiple of 4096", "check"),
    "name without end": (write_at(1072, b"x" * 1024), 2, "not NUL-terminated", "check"),
    "table without a place": (change(table_size=4096), 2, "not both set", "check"),
    "data file missing": (change(data_file="x", data_offset=0), 1, "does not exist", "back"),
    "foreign data format": (change(data_file_fmt="vdi"), 1, "data file format vdi", "NBD server"),
    "foreign base format": (
        change(base_img_fmt="parallels"), 1, "base format parallels", "convert"
    ),
    "base missing": (on_base(os.unlink), 1, "does not exist", "back"),
    "base too short": (on_base(lambda p: os.truncate(p, 512)), 1, "fewer than", "back"),
    "base changed": (on_base(lambda p: os.utime(p, (1, 1))), 1, "has changed", "--accept-changed"),
    "base outside": (change(base_img="/etc/passwd"), 1, "outside the allowed", "--allow-dir /etc"),
    "base is a link outside": (link_base_outside, 1, "outside the allowed", "--allow-dir /etc"),
    "base is a directory": (change(base_img="../"), 1, "outside the allowed", "--allow-dir"),
    "base is a device": (change(base_img="/dev/zero"), 1, "outside the allowed", "--allow-dir"),
    "base is the image": (
        change(base_img="clone.fvd", base_img_fmt="fvd", ext_base_kind=0), 2, "comes back",
        "real base again",
    ),
    "left by a dead process": (
        change(clean_shutdown=0, ext_boot_id=chain.boot_id()), 1, "process that died", "--state",
    ),
}  # fmt: skip


def assert_one_sentence(err, words, hint_words):
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("fvdctl: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint_words in lines[1]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, place, edit):
    damage, *expected = request.param
    damage(place, edit)
    return expected


def test_bad_image_cannot_be_mapped(place, fvdctl, case):
    _, words, hint_words = case
    before = digests(place)
    answer = fvdctl("map", "clone.fvd")
    assert answer.status == 1
    assert_one_sentence(answer.err, words, hint_words)
    assert digests(place) == before


def test_bad_image_fails_its_check(place, fvdctl, case):
    status, words, hint_words = case
    before = digests(place)
    answer = fvdctl("check", "clone.fvd")
    assert answer.status == status
    assert words in answer.out + answer.err
    if answer.err:
        assert_one_sentence(answer.err, words, hint_words)
    assert digests(place) == before


def test_bad_image_cannot_be_opened_for_writing(place, case):
    _, words, hint_words = case
    before = digests(place)
    with pytest.raises(EngineError) as caught:
        open_plan(place / "clone.fvd")
    assert words in caught.value.message
    assert hint_words in caught.value.hint
    assert digests(place) == before


def test_bad_image_cannot_be_a_base(place, fvdctl, case):
    before = digests(place)
    answer = fvdctl("create", "new.fvd", "--base", "clone.fvd", "--base-format", "fvd")
    assert answer.status == 1
    assert_one_sentence(answer.err, case[1], "")
    assert digests(place) == before


@pytest.mark.parametrize("words", [(), ("read",)], ids=["writer", "reader"])
def test_image_in_use_names_the_process(place, fvdctl, words):
    before = digests(place)
    with running(OPEN_AND_WAIT, str(place / "clone.fvd"), *words) as process:
        with pytest.raises(EngineError) as caught:
            open_plan(place / "clone.fvd")
        assert f"process {process.pid} (" in caught.value.message
        answer = fvdctl("create", "clone.fvd", "1M", "--force")
        assert answer.status == 1
        assert_one_sentence(answer.err, f"in use by process {process.pid} (", "fvdctl detach")
        for verb in ("check", "map"):
            answer = fvdctl(verb, "clone.fvd")
            assert answer.status == (0 if words else 1)
            if not words:
                assert_one_sentence(answer.err, f"process {process.pid} (", "Detach")
    assert digests(place) == before
    open_plan(place / "clone.fvd").close()


@pytest.mark.parametrize(
    "words",
    [("update", "clone.fvd", "copy_on_read=on"), ("resize", "clone.fvd", "2M"),
     ("resize", "clone.fvd", "512k", "--shrink", "--force"), ("check", "clone.fvd", "--repair")],
    ids=" ".join,
)  # fmt: skip
def test_upkeep_of_an_image_in_use_names_the_process(place, fvdctl, words):
    before = digests(place)
    with running(OPEN_AND_WAIT, str(place / "clone.fvd")) as process:
        answer = fvdctl(*words)
    assert answer.status == 1
    assert_one_sentence(answer.err, f"in use by process {process.pid} (", "Detach")
    assert digests(place) == before


def test_base_in_use_for_writing_names_the_process(place, fvdctl):
    fvdctl("create", "second.fvd", "--base", "clone.fvd", "--base-format", "fvd")
    before = digests(place)
    with running(OPEN_AND_WAIT, str(place / "clone.fvd")) as process:
        answer = fvdctl("map", "second.fvd")
        assert answer.status == 1
        assert_one_sentence(answer.err, f"clone.fvd is in use by process {process.pid}", "Detach")
    assert digests(place) == before


@pytest.mark.parametrize("size", ["0", "1", "1000", "-512", "12Q", "", "9999999P"])
def test_bad_size_makes_no_image(place, fvdctl, size):
    before = digests(place)
    answer = fvdctl("create", "new.fvd", "--", size)
    assert answer.status == 1
    assert len(answer.err.splitlines()) == 2
    assert "valid size" in answer.err
    assert digests(place) == before


@pytest.mark.parametrize(
    ("verb", "mode", "words"),
    [
        ("info", 0o600, "no permission to read"),
        ("map", 0o600, "no permission to read"),
        ("check", 0o600, "no permission to read"),
        ("create", 0o644, "no permission to write"),
    ],
)
def test_missing_permission_is_said_so(public_place, verb, mode, words):
    """As another user; root may do everything."""
    image = public_place / "clone.fvd"
    assert main(["create", str(image), "1M", "-q"]) == 0
    image.chmod(mode)
    before = digests(public_place)
    extra = ["1M", "--force"] if verb == "create" else []
    if os.geteuid() == 0:
        user = {"user": pwd.getpwnam("nobody").pw_uid, "extra_groups": []}
    else:
        image.chmod(0)
        user = {}
    answer = subprocess.run(
        [sys.executable, "-B", "-m", "fvdctl", verb, str(image), *extra],
        env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, **user,
    )  # fmt: skip
    image.chmod(mode)
    assert answer.returncode == 1
    assert_one_sentence(answer.stderr, words, "owner or root")
    assert digests(public_place) == before


def test_directory_without_permission_is_said_so(public_place):
    if os.geteuid() != 0:
        pytest.skip("needs a second user")
    answer = subprocess.run(
        [sys.executable, "-B", "-m", "fvdctl", "create", str(public_place / "x.fvd"), "1M"],
        env=ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False,
        user=pwd.getpwnam("nobody").pw_uid, extra_groups=[],
    )  # fmt: skip
    assert answer.returncode == 1
    assert_one_sentence(answer.stderr, "no permission", "root")
    assert os.listdir(public_place) == []


@pytest.mark.parametrize("verb", ["info", "check", "map"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("none.fvd", "does not exist"), (".", "is a directory"), ("/dev/null", "character device")],
)
def test_what_is_no_file_is_refused(place, fvdctl, verb, name, words):
    answer = fvdctl(verb, name)
    assert answer.status == 1
    assert_one_sentence(answer.err, words, "")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patches=st.lists(
        st.tuples(st.integers(0, 24576), st.binary(min_size=1, max_size=16)), max_size=4
    ),
    length=st.none() | st.integers(0, 40000),
)
def test_damaged_image_is_opened_or_refused_but_never_changed(place, patches, length):
    """Random bytes anywhere in the metadata: no exception but ours, no byte written."""
    source = (place / "clone.fvd").read_bytes()
    data = bytearray(source)
    for offset, patch in patches:
        data[offset : offset + len(patch)] = patch
    target = Path(place / "damaged.fvd")
    target.write_bytes(data[:length])
    before = target.read_bytes()
    refused = 0
    for options in (OpenOptions(), OpenOptions(read_only=True)):
        try:
            open_plan(target, options).close()
        except EngineError:
            refused += 1
    status = main(["check", "-q", str(target)])
    assert status in ((1, 2) if refused else (0, 2, 3))
    assert main(["info", "--json", str(target)]) in (0, 1)
    assert target.read_bytes() == before
