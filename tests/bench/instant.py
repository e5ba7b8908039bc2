# SPDX-License-Identifier: Apache-2.0
"""How soon a Debian on a far base is useful: a job of dpkg, perl and tar in a chroot of a clone.

    .venv/bin/python -P tests/bench/instant.py [--ways copy,qemu,fvd,profile] [--link 100:20]

The base is the root file system that `make run` has made, behind an nbdkit that is as slow as the
link: so many Mbit/s, so many ms before each answer. The ways: copy all of it first; a qcow2 clone
with QEMU's copy-on-read; a clone of ours with copy-on-read and prefetch, which records a profile; a
new one that follows it. Each does the same job once. Told are the seconds until the job could begin
(ready) and until it had ended (useful), and what had left the server by the detach; of ours also
what had been read of the base when it was useful, prefetch's part apart. It runs inside User Mode
Linux, whose system calls are slow: only the ways compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/lib"), str(ROOT)]

from fvdtest.guest import DRIVERS, Fvd, load_driver, run, wait_until  # noqa: E402
from fvdtest.remote import Nbdkit  # noqa: E402

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd/demo"
INSIDE = "FVD_INSTANT_INSIDE"
MACHINE_SECONDS = 1500
QEMU_NODE = Path("/dev/nbd0")  # qemu-nbd takes only nodes that are there
JOB = r"""
set -e
dpkg-query -W >/dev/null
dpkg --verify dpkg coreutils tar perl-base libc6
perl -MPOSIX -e 'print POSIX::floor(41.9), "\n"' >/dev/null
mkdir -p /tmp/job/DEBIAN /tmp/job/usr/share/job
printf 'Package: job\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n' \
  >/tmp/job/DEBIAN/control
printf 'Description: made inside the clone\n' >>/tmp/job/DEBIAN/control
tar -cf /tmp/job/usr/share/job/tree.tar -C / usr/bin etc
dpkg-deb --root-owner-group -Znone -b /tmp/job /tmp/job.deb >/dev/null
dpkg -i /tmp/job.deb >/dev/null
rm -rf /tmp/job /tmp/job.deb
sync
"""


@contextmanager
def mounted(device: str, point: Path) -> Iterator[None]:
    point.mkdir(exist_ok=True)
    run("mount", device, point)
    run("mount", "-t", "proc", "proc", point / "proc")
    try:
        yield
    finally:
        run("umount", point / "proc")
        run("umount", point)


def do_job(point: Path) -> None:
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    subprocess.run(["chroot", point, "/bin/sh"], input=JOB.encode(), check=True, env=path)


class Ways:
    """Each returns when a device can be mounted: its node, and what ends it."""

    def __init__(self, folder: Path, fvd: Fvd, uri: str, policy: str) -> None:
        self.folder, self.fvd, self.uri, self.policy = folder, fvd, uri, policy
        self.profile = folder / "boot.profile"

    def copy(self) -> tuple[str, Callable[[], object]]:
        path = self.folder / "copy.raw"
        run("nbdcopy", self.uri, path)
        node = run("losetup", "--find", "--show", path).stdout.strip()
        return node, lambda: run("losetup", "--detach", node)

    def qemu(self) -> tuple[str, Callable[[], object]]:
        path = self.folder / "clone.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.uri, path)
        process = subprocess.Popen(
            [
                "qemu-nbd", "-c", QEMU_NODE, "--discard=unmap", "--image-opts",
                "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,"
                f"file.file.filename={path}",
            ]
        )  # fmt: skip
        size = Path("/sys/block") / QEMU_NODE.name / "size"
        wait_until(lambda: size.exists() and int(size.read_text()), 60, "qemu-nbd")

        def end() -> None:
            run("qemu-nbd", "-d", QEMU_NODE)
            process.wait()

        return str(QEMU_NODE), end

    def fvd_first(self) -> tuple[str, Callable[[], object]]:
        return self._ours("first", "--profile", "record", self.profile)

    def fvd_profile(self) -> tuple[str, Callable[[], object]]:
        return self._ours("second", "--profile", "replay", self.profile)

    def read_of_base(self) -> dict[str, str]:
        """What our device has read so far, by who needed it, as the metrics tell."""
        line = re.compile(r'^fvd_base_bytes_total\{.*reason="(\w+)"\} (\S+)$', re.MULTILINE)
        found = line.findall(self.fvd.ctl("metrics").stdout)
        return {reason: f"{float(number) / (1 << 20):.2f} MiB" for reason, number in found}

    def _ours(self, name: str, *options: object) -> tuple[str, Callable[[], object]]:
        image = self.folder / f"{name}.fvd"
        self.fvd.ctl(
            "create", image, "--base", self.uri, "--copy-on-read", "--prefetch-delay", "0",
            "--prefetch-min-read", "0", "--prefetch-min-write", "0",
        )  # fmt: skip
        node = self.fvd.attach(
            image, "--name", name, "--allow-uri", self.uri, "--prefetch-policy", self.policy,
            *options,
        )  # fmt: skip
        return node, lambda: self.fvd.detach(name)


def sent(server: Nbdkit, statistics: Path) -> str:
    """What the server has read for its clients, as it tells at its end."""
    assert server.process is not None
    server.process.terminate()
    server.process.wait()
    line = next(one for one in statistics.read_text().splitlines() if one.startswith("read:"))
    return line.split(",")[2].strip()


def make_node() -> None:
    """Let the driver have a node of its own beside those that are made when they are asked for."""
    if not QEMU_NODE.exists():
        run("rmmod", "nbd")
        run("insmod", DRIVERS / "block/nbd.ko", "nbds_max=1", "max_part=16")


def inside(base: Path, mbit: int, delay: int, names: list[str], policy: str) -> None:
    """In the machine: every way, one after the other, over a fresh server."""
    make_node()
    load_driver("loop", "block/loop.ko")
    with tempfile.TemporaryDirectory(dir="/run/store") as name:
        folder = Path(name)
        run("cp", "--sparse=always", base, folder / "base.raw")
        fvd = Fvd(folder)
        fvd.start()
        for way in names:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            statistics = folder / f"{way}.stats"
            words = ("-t", "64", "--filter=stats", "--filter=delay", "--filter=rate", "file",
                     folder / "base.raw", f"rdelay={delay}ms", f"rate={mbit}M",
                     f"statsfile={statistics}")  # fmt: skip
            with Nbdkit(folder, *words) as server:
                ways = Ways(folder, fvd, server.uri, policy)
                calls = {"copy": ways.copy, "qemu": ways.qemu, "fvd": ways.fvd_first,
                         "profile": ways.fvd_profile}  # fmt: skip
                begin = time.monotonic()
                node, end = calls[way]()
                ready = time.monotonic() - begin
                with mounted(node, folder / "mount"):
                    do_job(folder / "mount")
                    useful = time.monotonic() - begin
                    read = ways.read_of_base()
                end()
                fetched = sent(server, statistics)
            found = {"way": way, "ready_s": round(ready, 1), "useful_s": round(useful, 1),
                     "fetched": fetched, "read_when_useful": read}  # fmt: skip
            print(json.dumps(found), flush=True)
        fvd.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", default="copy,qemu,fvd,profile")
    parser.add_argument("--link", default="100:20", metavar="MBIT:MS")
    parser.add_argument("--policy", default="polite", help="of our prefetch")
    parser.add_argument("--base", type=Path, default=next(CACHE.glob("*.ext4"), None))
    parser.add_argument("--kernel", default="debian", help="of User Mode Linux")
    arguments = parser.parse_args()
    if arguments.base is None:
        parser.error("there is no base: `make run` makes one")
    if INSIDE in os.environ:
        mbit, _, delay = arguments.link.partition(":")
        names = arguments.ways.split(",")
        inside(arguments.base, int(mbit), int(delay), names, arguments.policy)
        return 0
    words: list[object] = [
        sys.executable, "-P", ROOT / "tests/uml/run.py", "--quiet", "--kernel", arguments.kernel,
        "--mem", "2G", "--timeout", MACHINE_SECONDS, "--store", "8G", "--env", f"{INSIDE}=1",
        "--arg", "nbd.nbds_max=1", "--",
        sys.executable, "-P", __file__, "--ways", arguments.ways, "--link", arguments.link,
        "--base", arguments.base, "--policy", arguments.policy,
    ]  # fmt: skip
    return subprocess.run([str(word) for word in words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
