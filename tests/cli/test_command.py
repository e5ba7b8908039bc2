# SPDX-License-Identifier: Apache-2.0
"""The command as users start it: a process with exit status, stdout and stderr."""

import json
import os
import subprocess
import sys

from .conftest import ENVIRONMENT


def run(place, *words, **options):
    return subprocess.run(
        [sys.executable, "-m", "fvdctl", *words],
        **{"env": ENVIRONMENT, "cwd": place, "text": True, "capture_output": True, **options},
    )  # fmt: skip


def test_make_look_check_and_map(place):
    made = run(place, "create", "new.fvd", "8M", "--base", "base.raw", "--copy-on-read")
    assert (made.returncode, made.stderr) == (0, "")
    info = json.loads(run(place, "info", "new.fvd", "--json").stdout)
    assert info["size_bytes"] == 8 << 20
    assert info["header"]["copy_on_read"] == 1
    assert run(place, "check", "new.fvd").returncode == 0
    extents = json.loads(run(place, "map", "new.fvd", "--json").stdout)
    assert sum(extent["length"] for extent in extents) == 8 << 20


def test_offline_verbs_import_neither_daemon_nor_engine(place):
    code = (
        "import sys; from fvdctl.main import main; main(['check', 'clone.fvd']);"
        "main(['map', 'clone.fvd']); main(['info', 'clone.fvd']);"
        "sys.exit(bool({'httpx', 'pydantic', 'fvdapi', 'fvdd', 'fvdcore', 'rich'}"
        " & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=place, capture_output=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_no_traceback_unless_asked_for(place):
    plain = run(place, "info", "none.fvd")
    assert plain.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "Traceback" in run(place, "info", "none.fvd", "--debug").stderr


def test_reader_that_goes_away_is_no_error_to_talk_about(place):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        answer = run(
            place, "map", "clone.fvd", capture_output=False, stdout=write_end,
            stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert answer.returncode == 1
    assert answer.stderr == ""


def test_completion_knows_the_verbs(place):
    environment = {
        **ENVIRONMENT, "_FVDCTL_COMPLETE": "bash_complete", "COMP_WORDS": "fvdctl cr",
        "COMP_CWORD": "1",
    }  # fmt: skip
    answer = run(place, env=environment)
    assert "create" in answer.stdout


def test_map_of_the_base_part_agrees_with_qemu(place):
    """The raw base below a fresh clone, with holes, as qemu-img sees the same file."""
    with (place / "holes.raw").open("wb") as file:
        file.truncate(4 << 20)
        for offset in (0, 1 << 20, 3 << 20):
            file.seek(offset)
            file.write(b"d" * 65536)
    run(place, "create", "h.fvd", "--base", "holes.raw")
    ours = json.loads(run(place, "map", "h.fvd", "--json").stdout)
    command = ["qemu-img", "map", "-f", "raw", "--output=json", "holes.raw"]
    theirs = json.loads(subprocess.check_output(command, cwd=place))
    keys = ("start", "length", "zero", "data")
    assert [[item[key] for key in keys] for item in ours] == [
        [item[key] for key in keys] for item in theirs
    ]
