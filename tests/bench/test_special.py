# SPDX-License-Identifier: Apache-2.0
"""Jobs against a limit: the direction of their ratios, and what they read out of a log."""

import json
import sys

import pytest

from fvdtest.bench import command, engine, kills, limits, links, postmark, probes, programs, special
from fvdtest.bench.stand import Stand, StandError
from fvdtest.images import make_image


def test_less_is_better_unless_it_is_a_rate():
    assert limits.against_limit("x", 0.1, 0.2, "s").ratio == 2.0
    assert limits.against_limit("x", 50.0, 100.0, "B/s", least=True).ratio == 0.5
    assert limits.against_limit("x", 0.3, 0.2, "s").met is False
    assert limits.against_limit("x", 0.3, 0.2, "s", wanted=None).met is None


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
    told = programs.run([sys.executable, "-P", "-c", special.OPENING, str(image)])
    seconds, grown, metadata = json.loads(told)
    assert 0 < seconds < 30
    assert grown >= 0
    assert metadata >= 4096


def test_program_that_fails_is_told_with_its_words():
    with pytest.raises(StandError, match="not so"):
        programs.run(["sh", "-c", "echo not so >&2; exit 1"])


def test_probe_that_fails_is_left_out_and_told(tmp_path, monkeypatch, capsys):
    def fail(stand, quick):
        raise StandError("no such link")

    monkeypatch.setitem(probes.PROBES, "open-1T", probes.Probe("", fail))
    words = ["open-1T", "--dir", str(tmp_path), "--json", str(tmp_path / "b.json"),
             "--chart", str(tmp_path / "b.svg")]  # fmt: skip
    assert command.main(words) == 1
    assert "no such link" in capsys.readouterr().err


def test_prefetch_is_told_as_a_part_of_the_link(tmp_path, monkeypatch):
    monkeypatch.setattr(special, "PREFETCH_BYTES", 8 << 20)
    monkeypatch.setattr(special, "LINK_BYTES_PER_SECOND", 32 << 20)
    with Stand(tmp_path) as stand:
        (row,) = special.prefetch_idle(stand, True)
    assert row.wanted == 0.95
    assert 0 < row.ratio < 2


def test_foreground_beside_prefetch_is_the_median_of_its_turns(tmp_path, monkeypatch):
    told = {"mbit": 1, "delay_ms": 1, "idle": 0.9}
    for turn, (alone, beside) in enumerate([(1.0, 1.2), (2.0, 2.2), (1.0, 9.0)]):
        told |= {f"alone{turn}": {"p99": alone}, f"polite{turn}": {"p99": beside,
                                                                    "ratio": beside / alone}}
    said = []

    def run(words):
        said.append(words)
        return "noise\n" + json.dumps(told) + "\n"

    monkeypatch.setattr(links, "run", run)
    monkeypatch.setattr(links.os, "geteuid", lambda: 0)
    with Stand(tmp_path) as stand:
        (row,) = links.prefetch_fg(stand, False)
        (fsync,) = links.prefetch_fsync(stand, True)
        assert said[1][-2:] == ["--fsync", str(stand.directory)]
    assert (row.value, row.met) == (pytest.approx(1.2), True)
    assert (fsync.value, fsync.met) == (pytest.approx(1.2), True)


def test_shaped_link_is_refused_without_root(tmp_path, monkeypatch):
    monkeypatch.setattr(links.os, "geteuid", lambda: 1000)
    with Stand(tmp_path) as stand, pytest.raises(StandError, match="root"):
        links.prefetch_fg(stand, True)


def test_mails_are_compared_round_by_round(tmp_path, monkeypatch):
    row = postmark.row_of({"fvd": [300.0, 100.0], "qcow2": [100.0, 100.0]})
    assert (row.ratio, row.low, row.high, row.met) == (2.0, 1.0, 3.0, True)
    monkeypatch.setattr(postmark, "run", lambda words: "no kernel here\n")
    with Stand(tmp_path) as stand, pytest.raises(StandError, match="no kernel here"):
        postmark.postmark(stand, True)


def test_engine_beside_a_raw_file_has_a_row_for_each_kind(tmp_path, native, monkeypatch):
    monkeypatch.setattr(engine, "ROUNDS", 1)
    with Stand(tmp_path) as stand:
        rows = probes.PROBES["engine"].rows(stand, True)
    assert [row.job.removeprefix("engine-") for row in rows] == [
        "compact-read", "compact-write", "clone-read", "clone-write",
    ]  # fmt: skip
    assert all(0.5 < row.value < 50 and row.wanted == 1.0 for row in rows)


def test_a_killed_worker_is_a_pause_that_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "QUICK_KILLS", 1)
    with Stand(tmp_path) as stand:
        longest, median = probes.PROBES["kill-9"].rows(stand, True)
    assert 0 < median.value == longest.value
    assert longest.unit == "s"
