# SPDX-License-Identifier: Apache-2.0
"""Jobs against a limit: the direction of their ratios, and what they read out of a log."""

import json
import sys

import pytest

from fvdtest.bench import command, special
from fvdtest.bench.stand import Stand, StandError
from fvdtest.images import make_image


def test_less_is_better_unless_it_is_a_rate():
    assert special.against_limit("x", 0.1, 0.2, "s").ratio == 2.0
    assert special.against_limit("x", 50.0, 100.0, "B/s", least=True).ratio == 0.5
    assert special.against_limit("x", 0.3, 0.2, "s").met is False
    assert special.against_limit("x", 0.3, 0.2, "s", wanted=None).met is None


def test_moments_of_prefetch_are_read_out_of_the_log():
    log = (
        'time=2026-01-02T03:04:05.250Z level=info message="engine event" event=prefetch '
        "state=running\nnoise\n"
        'time=2026-01-02T03:04:07.750Z level=info message="engine event" event=prefetch '
        "state=done\n"
    )
    seen = special.moments(log)
    assert seen["done"] - seen["running"] == 2.5
    assert special.moments("nothing") == {}


def test_open_is_measured_in_a_process_of_its_own(tmp_path):
    image = make_image(tmp_path / "a.fvd", size=1 << 30, compact=True)
    told = special.run([sys.executable, "-P", "-c", special.OPENING, str(image)])
    seconds, grown, metadata = json.loads(told)
    assert 0 < seconds < 30
    assert grown >= 0
    assert metadata >= 4096


def test_program_that_fails_is_told_with_its_words():
    with pytest.raises(StandError, match="not so"):
        special.run(["sh", "-c", "echo not so >&2; exit 1"])


def test_probe_that_fails_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    def fail(stand):
        raise StandError("no such link")

    monkeypatch.setitem(special.PROBES, "open-1T", fail)
    words = ["open-1T", "--dir", str(tmp_path), "--json", str(tmp_path / "b.json"),
             "--chart", str(tmp_path / "b.svg")]  # fmt: skip
    assert command.main(words) == 1
    assert "no such link" in capsys.readouterr().err


def test_prefetch_is_told_as_a_part_of_the_link(tmp_path, monkeypatch):
    monkeypatch.setattr(special, "PREFETCH_BYTES", 8 << 20)
    monkeypatch.setattr(special, "LINK_BYTES_PER_SECOND", 32 << 20)
    with Stand(tmp_path) as stand:
        (row,) = special.prefetch_idle(stand)
    assert row.wanted == 0.95
    assert row.ratio > 0.05
