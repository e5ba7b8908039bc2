# SPDX-License-Identifier: Apache-2.0
"""Calls in the wrong order or from two threads: each in a process of its own, which may not die."""

import os
import subprocess
import sys

import pytest

from fvdcore import Device  # noqa: F401  (a stale build fails here, not in the child)

PRELUDE = """
import os, sys, threading, time
from pathlib import Path
from fvdtest.images import make_image, open_image
folder = Path(sys.argv[1])
(folder / "base.raw").write_bytes(os.urandom(8 << 20))
image = make_image(folder / "clone.fvd", base=str(folder / "base.raw"))
ALONE = 2 if os.environ.get("FVD_STEPPED") == "tsan" else 1  # a sanitizer has a thread of its own
def tasks():
    return len(os.listdir("/proc/self/task"))
def settle(count):
    deadline = time.monotonic() + 5
    while tasks() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return tasks() <= count
"""

CASES = {
    "prefetch before start": """
device = open_image(image, start=False).device
try:
    device.prefetch_start()
except ValueError:
    pass
device.close()
assert settle(ALONE), "the prefetch thread outlives its device"
""",
    "a chain of one image more than fits": """
from fvdcore import Device
plain = make_image(folder / "plain.fvd", size=65536)
fd = os.open(plain, os.O_RDWR)
try:
    Device.open([(fd, "fvd")] * 65)
except ValueError:
    pass
else:
    sys.exit("65 images were taken")
""",
    "close while others read and write": """
device = open_image(image).device
def work(number):
    try:
        for turn in range(100_000):
            device.write(number << 20, b"x" * 70_000)
            device.read(number << 20, 70_000)
    except ValueError:
        pass
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
while device.counter(1) < 20:
    time.sleep(0.001)
device.close()
for thread in threads:
    thread.join()
""",
    "two threads close": """
for _ in range(20):
    device = open_image(image).device
    device.write(0, b"x")
    threads = [threading.Thread(target=device.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert settle(ALONE)
""",
    "drain for ever": """
device = open_image(image).device
assert device.drain(float("inf")) is True
assert device.drain(1e300) is True
device.close()
""",
}


@pytest.mark.parametrize("name", CASES)
def test_misuse_is_answered_or_harmless(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + CASES[name], str(tmp_path)],
        capture_output=True, text=True, timeout=40, check=False,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
