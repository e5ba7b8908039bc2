# SPDX-License-Identifier: Apache-2.0
"""What `fvdctl trace` writes to takes the place of an earlier trace, and of nothing else."""

import os

import pytest
from click.testing import CliRunner

from fvdctl.main import cli


@pytest.fixture
def target(tmp_path, request):
    path = tmp_path / "trace.json"
    made = {
        "image": lambda: path.write_bytes(b"FVD\0precious"),
        "empty": path.touch,
        "other json": lambda: path.write_text('{"displayTimeUnit": "ms"}'),
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("/dev/null"),
        "dangling link": lambda: path.symlink_to("nothing"),
    }
    made[request.param]()
    return path


@pytest.mark.parametrize(
    "target", ["image", "empty", "other json", "pipe", "link", "dangling link"], indirect=True
)
def test_what_is_no_trace_is_refused_and_as_it_was(target):
    before = os.lstat(target)
    result = CliRunner().invoke(cli, ["trace", "web", str(target)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{target} exists and is no trace: name a file that" in result.stderr
    after = os.lstat(target)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout"])
def test_devices_are_refused(path):
    result = CliRunner().invoke(cli, ["trace", "web", path])
    assert result.exit_code == 1
    assert f"{path} exists and is no trace" in result.stderr
