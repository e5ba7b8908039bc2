# SPDX-License-Identifier: Apache-2.0
"""Metrics for node_exporter: only fvd's own, in a file that is whole at any moment."""

import os
import stat

import pytest
from click.testing import CliRunner

from fvdctl.commands.metrics import own_families, write_textfile
from fvdctl.main import cli

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


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_name_may_hold_what_python_takes_for_an_end_of_a_line(mark):
    """It would cut the line in two, and node_exporter refuses the whole file then."""
    line = f'fvd_device_info{{image="/a{mark}fvd_b"}} 1\n'
    assert own_families(f"process_x 1\n{line}") == line


def test_what_is_no_file_is_not_replaced(tmp_path):
    other = tmp_path / "fvd.prom"
    os.mkfifo(other)
    result = CliRunner().invoke(cli, ["metrics", "--textfile", str(other)])
    assert result.exit_code == 1
    assert "is no regular file" in result.stderr
    assert stat.S_ISFIFO(other.stat().st_mode)


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
