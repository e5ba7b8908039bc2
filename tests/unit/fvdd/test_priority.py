# SPDX-License-Identifier: Apache-2.0
"""Who hurries and for how long. That a worker which serves does not is in kernel/test_confined."""

import os
import subprocess
import sys

import pytest

from fvdd.priority import HURRIED, USUAL

PROGRAM = """
import os, threading
from fvdd import priority

def values():
    return [os.getpriority(os.PRIO_PROCESS, int(name)) for name in os.listdir("/proc/self/task")]

priority.hurry()
threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
before = values()
priority.hurry_no_more()
print(*sorted(set(before)), *sorted(set(values())), len(before))
"""


def may_hurry():
    """Whether this host lets us; containers often do not."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, HURRIED)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("privileged", [True, False])
def test_all_threads_hurry_until_told_otherwise_where_that_is_permitted(privileged):
    # Without the privilege nothing fails, and nothing changes.
    drop = [] if privileged else ["setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]
    argv = [*drop, sys.executable, "-P", "-c", PROGRAM]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    before = HURRIED if privileged and may_hurry() else USUAL
    assert done.stdout.split() == [str(before), str(USUAL), "4"]
