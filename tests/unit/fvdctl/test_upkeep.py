# SPDX-License-Identifier: Apache-2.0
"""update as a command: words arrive, answers have their form, mistakes change nothing."""

import json

import pytest

from fvdctl.main import main
from fvdengine.header import Header


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, capsys):
    """A directory with base.raw and clone.fvd, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"b" * (1 << 20))
    assert main(["create", "clone.fvd", "--base", "base.raw", "--journal-size", "64k", "-q"]) == 0
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*words):
        status = main(list(words))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def header_of(path):
    return Header.unpack(path.read_bytes()[:8192])


def test_update_says_what_changed(here, run):
    status, out, err = run("update", "clone.fvd", "copy_on_read=on", "bytes_per_prefetch=64k")
    assert (status, err) == (0, "")
    assert out.splitlines() == ["copy_on_read: 0 -> 1", "bytes_per_prefetch: 1048576 -> 65536"]
    assert header_of(here / "clone.fvd").bytes_per_prefetch == 65536
    assert run("update", "clone.fvd", "copy_on_read=on") == (0, "nothing to change\n", "")
    assert run("update", "clone.fvd", "copy_on_read=off", "-q") == (0, "", "")


def test_update_as_json(run):
    status, out, _ = run("update", "clone.fvd", "prefetch_start_delay=7", "--json")
    assert status == 0
    assert json.loads(out) == {
        "path": "clone.fvd", "changes": {"prefetch_start_delay": {"old": -1, "new": 7}},
        "warnings": [],
    }  # fmt: skip


def test_update_follows_a_renamed_base(here, run):
    (here / "base.raw").rename(here / "golden.raw")
    status, out, _ = run("update", "clone.fvd", "base_img=golden.raw")
    assert (status, out) == (0, "base_img: base.raw -> golden.raw\n")
    assert run("check", "clone.fvd")[0] == 0


def test_update_takes_another_base_only_by_force(here, run):
    (here / "other.raw").write_bytes(b"b" * (1 << 20))
    status, _, err = run("update", "clone.fvd", "base_img=other.raw")
    assert status == 1
    assert "--unsafe" in err
    assert run("update", "clone.fvd", "base_img=other.raw", "--unsafe")[0] == 0
    assert run("check", "clone.fvd")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["copy_on_read"], "not KEY=VALUE"),
        (["copy_on_read=on", "copy_on_read=off"], "given twice"),
        (["=on"], "no field"),
        (["num_prefetch_slots=0"], "num_prefetch_slots cannot be '0'"),
        ([], "Missing argument"),
    ],
    ids=["no value", "twice", "no key", "bad value", "nothing"],
)
def test_update_refuses_in_one_sentence_and_changes_nothing(here, run, words, message):
    before = (here / "clone.fvd").read_bytes()
    status, out, err = run("update", "clone.fvd", *words)
    assert (status, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert (here / "clone.fvd").read_bytes() == before


def test_update_help_lists_every_key(run):
    from fvdengine.update import KEYS

    out = run("update", "--help")[1]
    assert [key for key in KEYS if key not in out] == []


def damage(here, offset, data):
    with (here / "clone.fvd").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_check_repairs_and_says_what_it_did(here, run):
    damage(here, 0, bytes(4096))
    before = (here / "clone.fvd").read_bytes()
    status, out, _ = run("check", "clone.fvd", "--repair", "--dry-run")
    assert status == 2
    assert "would restore the first page" in out
    assert (here / "clone.fvd").read_bytes() == before
    status, out, _ = run("check", "clone.fvd", "--repair")
    assert status == 0
    assert "done: restore the first page" in out
    assert out.endswith("clone.fvd: no errors found\n")
    assert run("check", "clone.fvd", "--repair")[1].startswith("nothing to repair\n")


def test_check_names_the_remedy_once_and_not_after_it_was_taken(here, run):
    for _ in range(2):
        damage(here, (here / "clone.fvd").stat().st_size + 8191, b"x")
    damage(here, 8192, bytes(4096))
    remedy = "hint: `fvdctl check --repair clone.fvd` mends what can be mended\n"
    assert run("check", "clone.fvd")[1].count(remedy) == 1
    assert run("check", "clone.fvd", "-q")[1].count(remedy) == 1
    assert "hint" not in run("check", "clone.fvd", "--repair")[1]
    (here / "base.raw").unlink()
    status, out, _ = run("check", "clone.fvd")
    assert status == 1
    assert "hint: " in out
    assert remedy not in out


def test_same_size_is_said_to_be_there_already(run):
    assert run("resize", "clone.fvd", "+0")[1] == "clone.fvd has 1M already\n"


def test_check_repairs_as_json(here, run):
    damage(here, 8192, bytes(4096))
    status, out, _ = run("check", "clone.fvd", "--repair", "--json")
    answer = json.loads(out)
    assert status == answer["exit_status"] == 0
    assert answer["dry_run"] is False
    assert [action["code"] for action in answer["actions"]] == ["refresh_backup"]
    assert [f["code"] for f in answer["before"]["findings"]] == ["backup_header"]
    assert answer["before"]["findings"][0]["remedy"] == "fvdctl check --repair"
    assert answer["after"]["findings"] == []


def test_dry_run_alone_is_a_mistake(run):
    status, _, err = run("check", "clone.fvd", "--dry-run")
    assert status == 1
    assert "--dry-run has no meaning without --repair" in err


def test_check_says_what_helps_in_json(here, run):
    damage(here, 16384 + 100, b"\xff")
    status, out, _ = run("check", "clone.fvd", "--json")
    finding = json.loads(out)["findings"][0]
    assert status == 2
    assert finding["severity"] == "corrupt"
    assert finding["where"] == "bitmap"
    assert finding["remedy"] == "fvdctl check --repair"


def test_resize_shrinks_and_says_so(here, run):
    status, _, err = run("resize", "clone.fvd", "512k")
    assert status == 1
    assert "--shrink" in err
    status, _, err = run("resize", "clone.fvd", "512k", "--shrink")
    assert status == 1
    assert "--force" in err
    answer = run("resize", "clone.fvd", "512k", "--shrink", "--force")
    assert answer == (0, "clone.fvd: 1M -> 512k\n", "")
    assert header_of(here / "clone.fvd").virtual_disk_size == 512 << 10
    assert run("check", "clone.fvd", "-q") == (0, "", "")


def test_resize_as_json(run):
    status, out, _ = run("resize", "clone.fvd", "256k", "--shrink", "--force", "--json")
    assert status == 0
    assert json.loads(out) == {
        "path": "clone.fvd", "old_size_bytes": 1 << 20, "size_bytes": 256 << 10, "warnings": [],
    }  # fmt: skip


@pytest.mark.parametrize("size", ["1000", "-1M", "x", "9E"])
def test_resize_refuses_bad_sizes_in_one_sentence(here, run, size):
    before = (here / "clone.fvd").read_bytes()
    status, out, err = run("resize", "clone.fvd", "--", size)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 2
    assert (here / "clone.fvd").read_bytes() == before
