# SPDX-License-Identifier: Apache-2.0
"""The runner of User Mode Linux: exit status, output, time-out, plug, shared folders, stores."""

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("run.py")
LIMIT_SECONDS = 100
WRITE_RECORDS = """
import os, sys
for number in range(1000):
    with open(f"/run/store/{sys.argv[1]}{number:04}", "wb") as file:
        file.write(os.urandom(20_000))
        if sys.argv[1] == "synced":
            os.fsync(file.fileno())
            directory = os.open("/run/store", os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    print(f"wrote {number};", flush=True)
"""


def uml(*words):
    return subprocess.run(
        [sys.executable, "-P", RUNNER, *map(str, words)],
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip


def test_command_gives_its_output_and_exit_status(tmp_path):
    script = "echo out; echo err >&2; touch made; cat /sys/module/nbd/parameters/nbds_max; exit 7"
    done = uml("--share", tmp_path, "--env", "A=b c", "--", "sh", "-c", f"cd {tmp_path}; {script}")
    assert done.returncode == 7
    assert done.stdout == "out\nerr\n0\n"
    assert (tmp_path / "made").exists()


def test_command_that_takes_too_long_is_ended():
    done = uml("--timeout", "3", "--", "sleep", "100")
    assert done.returncode == 124
    assert "time-out" in done.stderr


def test_dead_kernel_is_told_apart():
    done = uml("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert done.returncode == 125
    assert "the kernel died" in done.stderr


def test_missing_kernel_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = uml("--kernel", "new", "--", "true")
    assert done.returncode == 125
    assert "make uml-kernel" in done.stderr


@pytest.mark.parametrize("mode", ["synced", "lazy"])
def test_pulled_plug_loses_what_was_not_synced(tmp_path, mode):
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    script = (
        "mkdir -p /run/store && mount -o commit=600 /dev/ubda /run/store && "
        'exec python3 -c "$0" "$1"'
    )
    words = ("--ubd", disk, "--pull", "wrote 200;", "--", "sh", "-c", script, WRITE_RECORDS, mode)
    done = uml(*words)
    assert done.returncode == 137, done.stderr
    announced = done.stdout.count("wrote")
    assert announced >= 200
    checked = subprocess.run(["e2fsck", "-fp", disk], capture_output=True, text=True, check=False)
    assert checked.returncode in (0, 1), checked.stdout
    listing = subprocess.run(
        ["debugfs", "-R", "ls -p /", disk], capture_output=True, text=True, check=True
    )
    kept = listing.stdout.count(f"/{mode}")
    assert kept >= announced if mode == "synced" else kept < announced
