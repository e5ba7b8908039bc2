# SPDX-License-Identifier: Apache-2.0
"""create, info, check and map as commands: options arrive, output has its form."""

import json
import os

import pytest

from fvdctl.main import main
from fvdengine.header import Header

OPTIONS = [
    ("--block-size", "64k", "block_size", 65536),
    ("--journal-size", "1M", "journal_size", 1 << 20),
    ("--journal-buffer", "4k", "journal_buf_size", 4096),
    ("--journal-period", "77", "journal_clean_buf_period", 77),
    ("--copy-on-read", None, "copy_on_read", 1),
    ("--max-outstanding-copy-on-read", "8M", "max_outstanding_copy_on_read_data", 8 << 20),
    ("--prefetch-delay", "30", "prefetch_start_delay", 30),
    ("--prefetch-delay", "0", "prefetch_start_delay", 0),
    ("--prefetch-delay", "off", "prefetch_start_delay", -1),
    ("--prefetch-slots", "7", "num_prefetch_slots", 7),
    ("--bytes-per-prefetch", "2M", "bytes_per_prefetch", 2 << 20),
    ("--prefetch-read-measure-time", "5", "prefetch_read_throughput_measure_time", 5),
    ("--prefetch-write-measure-time", "6", "prefetch_write_throughput_measure_time", 6),
    ("--prefetch-min-read", "0", "prefetch_min_read_throughput", 0),
    ("--prefetch-min-write", "1", "prefetch_min_write_throughput", 1),
    ("--prefetch-max-read", "6000", "prefetch_max_read_throughput", 6000),
    ("--prefetch-max-write", "7000", "prefetch_max_write_throughput", 7000),
    ("--prefetch-throttle-time", "8", "prefetch_throttle_time", 8),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory with a base of 1 MiB, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.raw").write_bytes(b"b" * (1 << 20))
    return tmp_path


def run(capsys, *words):
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def header_of(path):
    return Header.unpack(path.read_bytes()[:8192])


@pytest.mark.parametrize(("option", "value", "field", "expected"), OPTIONS)
def test_option_arrives_in_the_header(here, capsys, option, value, field, expected):
    words = [option] if value is None else [option, value]
    assert run(capsys, "create", "c.fvd", "--base", "base.raw", *words)[0] == 0
    assert getattr(header_of(here / "c.fvd"), field) == expected


def test_create_says_what_it_made(here, capsys):
    status, out, err = run(capsys, "create", "c.fvd", "20M", "--base", "base.raw")
    assert (status, err) == (0, "")
    assert out == f"c.fvd: 20M, a clone of {here}/base.raw\n"
    assert run(capsys, "create", "d.fvd", "1G") == (0, "d.fvd: 1G\n", "")


def test_create_can_be_silent_and_machine_readable(capsys):
    assert run(capsys, "create", "c.fvd", "1M", "-q") == (0, "", "")
    status, out, _ = run(capsys, "create", "d.fvd", "--base", "base.raw", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["size_bytes"], found["base_format"]) == (1 << 20, "raw")


@pytest.mark.parametrize(
    "words",
    [["--compact"], ["--data-file", "d"], ["--detect-holes", "1M"], ["--chunk-size", "1M"],
     ["--storage-grow-unit", "1G"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_is_not_there_yet_is_refused_by_name(here, capsys, words):
    status, out, err = run(capsys, "create", "c.fvd", "1M", *words)
    assert (status, out) == (1, "")
    assert err.startswith(f"fvdctl: {words[0]} needs ")
    assert len(err.splitlines()) == 2
    assert os.listdir(here) == ["base.raw"]


def test_info_shows_the_chain(here, capsys):
    run(capsys, "create", "c.fvd", "--base", "base.raw")
    run(capsys, "create", "d.fvd", "--base", "c.fvd", "--base-format", "fvd")
    status, out, err = run(capsys, "info", "d.fvd")
    assert (status, err) == (0, "")
    lines = [line.split(None, 1) for line in out.splitlines()]
    assert ["base", f"{here}/c.fvd (fvd, 1M)"] in lines
    assert ["base", f"{here}/base.raw (raw, 1M)"] in lines
    assert ["state", "clean"] in lines


def test_info_shows_every_header_field_on_demand(capsys):
    run(capsys, "create", "c.fvd", "--base", "base.raw")
    _, out, _ = run(capsys, "info", "c.fvd", "--header")
    assert "prefetch_throttle_time" in out
    found = json.loads(run(capsys, "info", "c.fvd", "--json")[1])
    assert found["header"]["prefetch_throttle_time"] == 30000


@pytest.mark.parametrize(
    ("damage", "status", "word"),
    [
        (lambda path: None, 0, "no errors found"),
        (lambda path: os.unlink(path.parent / "base.raw"), 1, "could not be checked"),
        (lambda path: os.truncate(path, path.stat().st_size - 512), 2, "corrupt"),
        (lambda path: os.truncate(path, path.stat().st_size + 8192), 3, "leaks"),
    ],
    ids=["fine", "unchecked", "corrupt", "leaks"],
)
def test_check_has_its_exit_statuses(here, capsys, damage, status, word):
    run(capsys, "create", "c.fvd", "--base", "base.raw")
    damage(here / "c.fvd")
    found, out, _ = run(capsys, "check", "c.fvd")
    assert found == status
    assert word in out.splitlines()[-1]
    as_json, out, _ = run(capsys, "check", "c.fvd", "--json")
    assert as_json == json.loads(out)["exit_status"] == status
    assert run(capsys, "check", "c.fvd", "-q")[0] == status


def test_map_prints_extents(here, capsys):
    run(capsys, "create", "c.fvd", "2M", "--base", "base.raw")
    _, out, _ = run(capsys, "map", "c.fvd")
    rows = [line.split() for line in out.splitlines()]
    assert rows == [
        ["start", "length", "kind", "file"],
        ["0", "1048576", "base", f"{here}/base.raw", "at", "0"],
        ["1048576", "1048576", "zero"],
    ]
    assert len(run(capsys, "map", "c.fvd", "-q")[1].splitlines()) == 2
    extents = json.loads(run(capsys, "map", "c.fvd", "--json")[1])
    assert [item["kind"] for item in extents] == ["base", "zero"]
    assert {"start", "length", "depth", "present", "zero", "data", "offset"} <= set(extents[0])


def test_changed_base_can_be_accepted(here, capsys):
    run(capsys, "create", "c.fvd", "--base", "base.raw")
    os.utime(here / "base.raw", ns=(1, 1))
    assert run(capsys, "map", "c.fvd")[0] == 1
    assert run(capsys, "map", "c.fvd", "--accept-changed-base")[0] == 0
    assert run(capsys, "check", "c.fvd", "--accept-changed-base")[0] == 0


def test_base_directory_can_be_allowed(here, capsys):
    (here / "vm").mkdir()
    words = ("vm/c.fvd", "--base", "base.raw")
    assert run(capsys, "create", *words)[0] == 1
    assert run(capsys, "create", *words, "--allow-dir", ".")[0] == 0
    assert run(capsys, "check", "vm/c.fvd")[0] == 1
    assert run(capsys, "check", "vm/c.fvd", "--allow-dir", ".")[0] == 0
