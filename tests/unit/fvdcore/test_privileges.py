# SPDX-License-Identifier: Apache-2.0
"""Capabilities go in the thread that gives them up, and in others when they are asked."""

import json
import subprocess
import sys

SCRIPT = """
import json, os, threading, time
from fvdcore.privileges import limit_this_thread, limit_thread
KEPT = 1 << 2

def state(thread):
    lines = open(f"/proc/self/task/{thread}/status").read().splitlines()
    words = dict(line.split(":", 1) for line in lines)
    names = ("CapEff", "CapPrm", "CapBnd", "CapInh", "NoNewPrivs")
    return {name: int(words[name], 16) for name in names}

read, write = os.pipe()
answer = []
other = threading.Thread(target=lambda: answer.append(os.read(read, 10)))
other.start()
before = state(os.getpid())
limit_this_thread(KEPT)
left = state(other.native_id)
limit_thread(other.native_id)
deadline = time.monotonic() + 20
while state(other.native_id)["NoNewPrivs"] == 0:
    assert time.monotonic() < deadline
    time.sleep(0.001)
after = [state(os.getpid()), state(other.native_id)]
os.write(write, b"whole")
other.join()
while os.path.exists(f"/proc/self/task/{other.native_id}"):  # join returns a moment before its end
    assert time.monotonic() < deadline
try:
    limit_thread(other.native_id)
    gone = "asked"
except ProcessLookupError:
    gone = "gone"
print(json.dumps([before, left, after, answer[0].decode(), gone]))
"""


def test_threads_are_limited_one_by_one_and_their_calls_go_on():
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, left, after, answer, gone = json.loads(done.stdout)
    assert left == before
    for state in after:
        assert (state["CapEff"], state["CapInh"], state["NoNewPrivs"]) == (0, 0, 1)
        assert state["CapPrm"] == before["CapPrm"] & 1 << 2
        # Only who has privileges can, and need, give up what programs would gain.
        if before["CapEff"]:
            assert state["CapBnd"] == before["CapBnd"] & 1 << 2
    assert (answer, gone) == ("whole", "gone")
