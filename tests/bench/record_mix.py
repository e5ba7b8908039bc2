#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record what a file system asks of its disk during a real job: tests/fixtures/mix-fs.iolog.gz.

Runs inside User Mode Linux, which has a kernel's device and ext4 for it:
    tests/uml/run.py --kernel new --store 2G -- .venv/bin/python -P tests/bench/record_mix.py
The job: make a file system, unpack Python's library, compile parts of it, copy it, remove one,
each step synced. What is written is fio's iolog of version 2, whose times are left out.
"""

import gzip
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/lib"))

from fvdtest.guest import Fvd, run, wait_until  # noqa: E402

TARGET = ROOT / "tests/fixtures/mix-fs.iolog.gz"
LIBRARY, COMPILED = "/usr/lib/python3.11", ("asyncio", "email", "json")
DISK = "240M"  # smaller than the disks of the job that replays it
NAMES = {"read": "read", "write": "write", "flush": "sync"}


def job(device: str, point: Path) -> None:
    """Each step as a user would do it."""
    run("mkfs.ext4", "-q", "-F", device)
    run("mount", device, point)
    first, second = point / "first", point / "second"
    first.mkdir()
    run("sh", "-c", f"tar -C {LIBRARY} -cf - . | tar -C {first} -xf -")
    run("sync")
    run(sys.executable, "-m", "compileall", "-q", "-f", *(first / name for name in COMPILED))
    run("sync")
    run("umount", point)  # so that the copy reads the disk
    run("mount", device, point)
    run("cp", "-a", first, second)
    run("sync")
    run("rm", "-r", first)
    run("umount", point)


def lines(text: str) -> list[str]:
    """The requests of a trace in the order of their arrival."""
    events = [one for one in json.loads(text)["traceEvents"]
              if one.get("cat") == "request" and one["ph"] == "b"]  # fmt: skip
    found = []
    for one in sorted(events, key=lambda one: one["ts"]):
        name = NAMES.get(one["name"])
        if name == "sync":
            found.append("disk sync 0 0")
        elif name is not None:
            found.append(f"disk {name} {one['args']['offset']} {one['args']['length']}")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fvd = Fvd(folder)
        fvd.start()
        # It has another name until it is whole.
        image, traces = Path("/run/store/disk.fvd"), folder / "traces"
        traces.mkdir()
        trace = traces / "trace.json"
        fvd.ctl("create", image, DISK)
        device = fvd.attach(image, "--name", "disk")
        tracer = subprocess.Popen(
            ["fvdctl", "trace", "disk", str(trace), "--seconds", "600", "--socket",
             str(fvd.socket)],
        )  # fmt: skip
        wait_until(lambda: any("traceEvents" in path.read_text() for path in traces.iterdir()), 60,
                   "the trace")  # fmt: skip
        (folder / "point").mkdir()
        job(device, folder / "point")
        tracer.send_signal(signal.SIGINT)
        tracer.wait(60)
        made = lines(trace.read_text())
        fvd.ctl("detach", "disk")
        fvd.stop()
    head = ["fio version 2 iolog", "disk add", "disk open"]
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write("\n".join([*head, *made, "disk close"]).encode() + b"\n")
    print(len(made), "requests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
