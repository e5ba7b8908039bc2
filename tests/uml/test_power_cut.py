# SPDX-License-Identifier: Apache-2.0
"""Power cuts: the machine dies under load again and again, and nothing that was synced is lost.

The store is ext4 on a disk that outlives the machine; what fvd has not flushed dies with the page
cache. FVD_POWER_CUTS is the number of cuts for each kind of image (make proof: 2; a campaign: 50).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("run.py")
ROUND = Path(__file__).with_name("power_cut.py")
LIMIT_SECONDS = 150
PULLED = 137
CUTS = int(os.environ.get("FVD_POWER_CUTS", "2"))


def kernel():
    """The newer kernel where it was built: system calls cost a third there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return "new" if os.access(cache / "fvd/uml/linux", os.X_OK) else "debian"


@pytest.fixture
def machine(tmp_path):
    """Runs one round: returns the exit status and the output."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    ledger = tmp_path / "ledger/promises"
    ledger.parent.mkdir()
    ledger.touch()

    def boot(kind, seed, *last, lie=""):
        words = [
            "--kernel", kernel(), "--timeout", LIMIT_SECONDS, "--ubd", disk, "--quiet",
            "--share", ledger.parent, "--env", f"PYTHONPATH={ROOT / 'tests/lib'}",
            "--env", f"FVD_LIE={lie}",
            "--pull", "cut here", "--",
            sys.executable, "-P", ROUND, kind, seed, ledger, *last,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-P", RUNNER, *map(str, words)],
            cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    boot.disk = disk
    boot.ledger = ledger
    return boot


def lying_flush(folder):
    """A library whose flushes do nothing."""
    source = "int fsync(int f) { return f < 0; }\nint fdatasync(int f) { return f < 0; }\n"
    (folder / "lie.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-o", folder / "lie.so", folder / "lie.c"], check=True)
    return folder / "lie.so"


@pytest.mark.proof
@pytest.mark.timeout(0)
def test_a_flush_that_does_nothing_is_caught(machine, seed):
    lie = lying_flush(machine.ledger.parent)
    status, output = machine("plain", seed, lie=lie)
    assert status == PULLED, output
    status, output = machine("plain", seed, "last")
    assert status not in (0, PULLED), output


@pytest.mark.proof
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["plain", "compact", "clone"])
def test_power_cuts_lose_nothing_that_was_synced(machine, seed, kind):
    promised = 0
    for cut in range(CUTS):
        status, output = machine(kind, seed + 2 * cut)
        assert status == PULLED, f"cut {cut}: {output}"
        lines = len(machine.ledger.read_text().splitlines())
        assert lines > promised, f"cut {cut}: nothing was written\n{output}"
        promised = lines
    status, output = machine(kind, seed, "last")
    assert status == 0, output
    assert "whole" in output
    assert promised > 10 * CUTS
    checked = subprocess.run(
        ["e2fsck", "-fp", machine.disk], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
