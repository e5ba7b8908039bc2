# SPDX-License-Identifier: Apache-2.0
"""The harness itself: the tests of this folder run under a kernel with an nbd driver of its own."""

import os
from pathlib import Path

import pytest

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
