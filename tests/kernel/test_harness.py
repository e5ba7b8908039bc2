# SPDX-License-Identifier: Apache-2.0
"""The harness itself: the tests of this folder run under a kernel with an nbd driver of its own."""

import os
from pathlib import Path

import pytest

from fvdtest.guest import hanging

pytestmark = pytest.mark.kernel


def test_guest_has_the_nbd_driver(uml_kernel):
    assert Path("/sys/module/nbd").is_dir()
    assert os.environ["FVD_UML"] == uml_kernel


def test_host_files_are_read_only():
    with pytest.raises(OSError, match="Read-only file system"):
        Path("/etc/fvd-test-of-the-harness").touch()


def test_store_has_holes(tmp_path):
    store = Path("/run/store/harness")
    with store.open("wb") as file:
        file.truncate(1 << 30)
        os.pwrite(file.fileno(), b"x", 1 << 20)
    assert store.stat().st_blocks * 512 < 1 << 20
    store.unlink()


def test_a_program_that_hangs_in_the_kernel_would_be_seen(tmp_path):
    for pid, state in ((12, "S"), (13, "D"), (14, "D")):
        (tmp_path / f"{pid}/task/{pid}").mkdir(parents=True)
        (tmp_path / f"{pid}/task/{pid}/stat").write_text(f"{pid} (a) D (b) {state} 1 1")
        (tmp_path / f"{pid}/cmdline").write_bytes(b"" if pid == 14 else b"sync\0")
    assert [words.split("\0")[0] for words in hanging(tmp_path)] == ["13 sync"]
