# SPDX-License-Identifier: Apache-2.0
"""Metrics for node_exporter: only fvd's own, in a file that is whole at any moment."""

import os
import stat

import pytest

from fvdctl.commands.metrics import own_families, write_textfile

TEXT = """\
# HELP process_open_fds Open.
# TYPE process_open_fds gauge
process_open_fds 3.0
# HELP fvd_device_up Up.
# TYPE fvd_device_up gauge
fvd_device_up{device="nbd0",x="process_open_fds 3"} 1
# HELP python_gc_objects_collected_total fvd_ is not in the name.
"""


def test_only_our_own_families_stay():
    assert own_families(TEXT).splitlines() == TEXT.splitlines()[3:6]


def test_the_file_is_replaced_and_readable(tmp_path):
    path = tmp_path / "fvd.prom"
    path.write_text("old")
    path.chmod(0o600)
    before = path.stat().st_ino
    write_textfile(str(path), "new\n")
    assert path.read_text() == "new\n"
    assert path.stat().st_ino != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["fvd.prom"]


def test_what_cannot_be_written_leaves_no_trace(tmp_path):
    path = tmp_path / "fvd.prom"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_textfile(str(path), "new\n")
    assert os.listdir(tmp_path) == ["fvd.prom"]
