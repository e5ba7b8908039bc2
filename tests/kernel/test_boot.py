# SPDX-License-Identifier: Apache-2.0
"""A real systemd boots with the units, mounts by fstab, and shuts down in the right order.

It runs as the first process of namespaces of its own, on the kernel of the machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fvdtest import tree
from fvdtest.guest import checksum, run

pytestmark = [pytest.mark.kernel, pytest.mark.proof, pytest.mark.timeout(400)]

BOOT_SECONDS = 300

PROGRAMS = Path(sys.executable).parent

# What is done in the booted system. `set -e`: anything that fails leaves no "done".
PROOF = """
set -ex
test "$(findmnt -no SOURCE {work}/mnt)" = "$(readlink -f /dev/disk/by-fvd/web)"
test "$(readlink -f /dev/fvd/web)" = "$(readlink -f /dev/disk/by-fvd/web)"
systemctl is-active fvdd.socket fvdd.service fvd@web.service
pid() {{ {programs}/fvdctl status web --json | {python} -c 'import json, sys
print(json.load(sys.stdin)["worker_pid"])'; }}
worker=$(pid)
cat /proc/$worker/cgroup
grep -q 'fvd.slice/fvd-worker-.*[.]scope$' /proc/$worker/cgroup
systemctl restart fvdd.service
test "$(pid)" = "$worker"
head -c 5000000 /dev/urandom >{work}/mnt/file
sha256sum <{work}/mnt/file >{work}/sum
echo done
"""


@pytest.fixture
def booted(store):
    """The folder of a system that has booted, worked and shut down."""
    work = store / "boot"
    work.mkdir()
    (work / "mnt").mkdir()
    golden = work / "golden.img"
    run("truncate", "-s", "64M", golden)
    run("mkfs.ext4", "-q", "-F", golden)
    run(PROGRAMS / "fvdctl", "create", work / "web.fvd", "--base", golden)
    words = {"work": work, "programs": PROGRAMS, "python": sys.executable}
    (work / "proof.sh").write_text(PROOF.format(**words))
    words = [
        "unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private",
        "bash", tree.ROOT / "tests/kernel/boot.sh", work, tree.ROOT / "packaging/systemd",
        tree.ROOT / "packaging/udev", PROGRAMS,
    ]  # fmt: skip
    # The status is that of a first process that has powered off.
    with (work / "proof.log").open("wb") as log:
        subprocess.run(words, timeout=BOOT_SECONDS, check=False, stdout=log, stderr=log)
    return work


def test_boot_mounts_by_fstab_and_shutdown_loses_nothing(booted, fvd, mounts):
    log = (booted / "proof.log").read_text()
    assert "\ndone\n" in log, log
    # Unmounted, then detached: the file system and the image are both clean, and all is there.
    assert not list(Path("/sys/block").glob("nbd*/pid"))
    info = json.loads(fvd.ctl("info", booted / "web.fvd", "--json").stdout)
    assert info["state"] == "clean"
    device = fvd.attach(booted / "web.fvd", "--read-only")
    head = run("dumpe2fs", "-h", device).stdout
    assert "Filesystem state:         clean" in head
    assert "needs_recovery" not in head
    point = mounts(device, "-o", "ro")
    assert checksum(point / "file") == (booted / "sum").read_text().split()[0]
    run("umount", point)
