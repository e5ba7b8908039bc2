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
    ("--add-storage-cmd", "builtin:lvextend", "add_storage_cmd", "builtin:lvextend"),
    ("--data-file", "c.data", "data_file", "c.data"),
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


def test_compact_options_arrive(here, capsys):
    words = ("--compact", "--chunk-size", "64k", "--storage-grow-unit", "1G", "-q")
    assert run(capsys, "create", "c.fvd", "--base", "base.raw", *words) == (0, "", "")
    header = header_of(here / "c.fvd")
    assert (header.is_compact, header.chunk_size, header.storage_grow_unit) == (
        True, 65536, 1 << 30,
    )  # fmt: skip


def test_create_says_where_the_data_are_and_what_are_holes(here, capsys):
    with (here / "base.raw").open("r+b") as file:
        file.write(bytes(1 << 19))
    words = ("--base", "base.raw", "--data-file", "c.data", "--detect-holes", "64k")
    status, out, err = run(capsys, "create", "c.fvd", *words)
    assert (status, err) == (0, "")
    assert out == (
        f"c.fvd: 1M, a clone of {here}/base.raw, data in {here}/c.data, 512k of it holes\n"
    )
    found = json.loads(run(capsys, "create", "d.fvd", "1M", "--compact", "--json")[1])
    assert (found["compact"], found["chunk_size"], found["data_file"]) == (True, 1 << 20, None)


def test_stored_command_is_warned_of_and_shown(capsys):
    words = ("--add-storage-cmd", "rm -rf /")
    _, _, err = run(capsys, "create", "c.fvd", "1M", *words)
    assert err == "fvdctl: warning: --add-storage-cmd is kept and shown, but never run\n"
    out = run(capsys, "info", "c.fvd")[1]
    assert "rm -rf / (never run)" in out


def test_info_of_a_compact_image_with_a_data_file(here, capsys):
    words = ("--compact", "--data-file", "c.data", "--journal-size", "64k", "-q")
    run(capsys, "create", "c.fvd", "16M", *words)
    lines = [line.split(None, 1) for line in run(capsys, "info", "c.fvd")[1].splitlines()]
    assert ["format", "fvd, compact layout, blocks of 4k, chunks of 1M"] in lines
    assert ["chunks", "0 of 16 have storage"] in lines
    assert ["journal", "0 of 64k, 0 records to replay"] in lines
    assert ["memory", "4k for bitmap and table"] in lines
    assert ["data", "file", f"{here}/c.data", "(raw,", "0)"] in [
        " ".join(line).split() for line in lines
    ]


def test_hostile_name_cannot_act_on_the_terminal(here, capsys):
    """The sentence about a base that is missing names it, without its escape sequences."""
    run(capsys, "create", "c.fvd", "--base", "base.raw")
    with (here / "c.fvd").open("r+b") as file:
        for at in (0, 8192):
            file.seek(at + 1072)
            file.write(b"a\x1b[31mb\x07\0")
    for verb in ("map", "info", "check"):
        _, out, err = run(capsys, verb, "c.fvd")
        assert "a?[31mb?" in out + err
        assert "\x1b" not in out + err


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
