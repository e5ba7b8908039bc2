# SPDX-License-Identifier: Apache-2.0
"""What a worker keeps, from what it serves; and that nothing of it is a reason not to serve."""

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fvdd.worker.confinement import CHILD_THREAD, needs_of
from fvdd.worker.seccomp import Needs


def plan(*layers):
    made = [SimpleNamespace(storage=(fd, "name"), remote=remote) for fd, remote in layers]
    return SimpleNamespace(layers=made)


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "image", "wb") as opened:
        yield opened.fileno()


def test_files_alone_need_nothing(file):
    assert needs_of(plan((file, None), (file, None)), False) == Needs()


def test_base_or_data_of_a_server_need_the_network(file):
    assert needs_of(plan((file, None), (file, object())), False) == Needs(network=True)
    assert needs_of(plan((-1, None), (file, None)), False) == Needs(network=True)


def test_server_of_a_base_is_a_program(file):
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name=CHILD_THREAD)
    thread.start()
    try:
        found = needs_of(plan((file, None), (file, object())), False)
    finally:
        end.set()
        thread.join()
    assert found == Needs(programs=True, network=True)


def test_storage_that_a_program_makes_longer_keeps_what_programs_need(file):
    assert needs_of(plan((file, None)), True) == Needs(programs=True, volumes=True)


# A process that confines itself cannot be this one.
SCRIPT = """
import logging, os, sys
from fvdd import log
from fvdd.worker import confinement, seccomp
log.setup("info")
{0}
confinement.confine(seccomp.Needs())
os.write(1, open("/proc/self/status", "rb").read())
"""


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("seccomp.is_supported = lambda: False", "no seccomp filters"),
        ("seccomp.LIBRARY = 'libseccomp.so.none'", "install the Debian package libseccomp2"),
    ],
)
def test_without_a_filter_a_warning_is_logged_and_the_rest_is_done(trouble, said):
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT.format(trouble)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "level=warning" in done.stderr
    assert said in done.stderr
    assert "filter=no" in done.stderr
    lines = [line.split(":\t") for line in done.stdout.splitlines()]
    status = {words[0]: words[1] for words in lines if len(words) == 2}
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_this_process_is_not_limited():
    """What the tests above do, they do elsewhere."""
    assert "NoNewPrivs:\t1" not in Path("/proc/self/status").read_text()
