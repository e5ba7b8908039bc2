# SPDX-License-Identifier: Apache-2.0
"""Arguments of the suite, its tables, and one small run from end to end."""

import json
import os
import shutil

import pytest

from fvdtest.bench import command, kinds, machine, run
from fvdtest.bench.jobs import BY_NAME, GIB, JOBS
from fvdtest.bench.run import Effort
from fvdtest.bench.stand import Stand, StandError


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-job"], ["--rounds", "0"], ["--rounds", "x"], ["--seconds", "-1"],
        ["--tolerance", "1"], ["--tolerance", "nan"], ["--what"],
    ],
)  # fmt: skip
def test_bad_argument_is_refused_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.arguments(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_quick_is_a_part_of_all_jobs_and_names_are_chosen():
    quick = command.chosen(command.arguments(["--quick"]))
    assert 5 < len(quick) < len(JOBS)
    assert command.chosen(command.arguments([])) == list(JOBS)
    assert [job.name for job in command.chosen(command.arguments(["trickle"]))] == ["trickle"]


def test_list_names_all_jobs(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(job.name in listed for job in JOBS)


def test_saved_run_that_is_none_ends_before_anything_runs(tmp_path, capsys):
    assert command.main(["--compare", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_job_names_servers_that_can_do_it(job):
    for name in (*job.ours, *job.peers):
        kind = kinds.KINDS[name]
        assert kind.ours == (name in job.ours)
        assert kind.make if job.state in ("local", "empty") else kind.clone
        assert kind.own or job.state != "chain"
    for target in job.targets:
        assert set(target.against) <= set(job.peers)
        assert target.speed or target.cpu
    servers = Effort(quick=True).servers(job)
    assert any(kinds.KINDS[name].ours for name in servers)
    assert not all(kinds.KINDS[name].ours for name in servers)


def test_runs_are_shortened_only_where_the_disk_could_fill_up():
    job = BY_NAME["alloc-rw-32"]
    assert Effort().duration(job, 100 * GIB) == job.seconds
    assert Effort().duration(job, 4 * GIB) == 2.0
    assert Effort(seconds=0.5).duration(job, 100 * GIB) == 0.5
    assert Effort(seconds=0.5).duration(BY_NAME["alloc-sw"], 0) == BY_NAME["alloc-sw"].seconds


def test_server_that_does_not_start_is_told_with_its_words(tmp_path):
    kind = kinds.Kind("none", ".raw", ("sh", "-c", "echo no such disk; exit 1"))
    with (
        Stand(tmp_path) as stand,
        pytest.raises(StandError, match="no such disk"),
        stand.running(kind, tmp_path / "x", 512),
    ):
        pytest.fail("it cannot run")


def test_image_that_cannot_be_made_is_told(tmp_path):
    kind = kinds.Kind("none", ".raw", (), (("sh", "-c", "echo full >&2; exit 1"),))
    with Stand(tmp_path) as stand, pytest.raises(StandError, match="full"):
        stand.empty(kind, 512)


def test_base_too_large_to_fill_has_data_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("fvdtest.bench.stand.DENSE_MAX", 1 << 20)
    with Stand(tmp_path) as stand:
        path = stand.random_file(128 << 20)
        assert path.stat().st_size == 128 << 20
        assert path.stat().st_blocks * 512 == 2 << 20
        assert stand.random_file(128 << 20) == path


def test_processor_time_and_memory_are_those_of_the_process():
    before = machine.cpu_seconds(os.getpid())
    sum(range(300_000))
    assert machine.cpu_seconds(os.getpid()) > before
    assert machine.resident_bytes(os.getpid()) > 1 << 20
    assert machine.version_of(("no-such-program",)) == ""


def test_small_run_measures_saves_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    for program in ("fio", "nbdkit"):
        if shutil.which(program) is None:
            pytest.skip(f"not installed: {program}")
    job = BY_NAME["hit-rr-32"]
    small = run.replace(
        job, ours=("fvd-compact",), peers=("nbdkit-file",), small=4 << 20, spared=(),
        options=(*job.options, "--time_based"),
    )  # fmt: skip
    monkeypatch.setattr(command, "chosen", lambda told: [small])
    monkeypatch.setattr(command, "chosen_probes", lambda told: [])
    files = ["--json", str(tmp_path / "b.json"), "--chart", str(tmp_path / "b.svg")]
    words = ["--quick", "--rounds", "1", "--seconds", "0.05", "--dir", str(tmp_path), *files]
    assert command.main(words) == 0
    told = json.loads((tmp_path / "b.json").read_text())
    assert {one["server"] for one in told["runs"]} == {"fvd-compact", "nbdkit-file"}
    assert all(one["value"] > 0 and one["cpu_us"] > 0 for one in told["runs"])
    (row,) = told["ratios"]
    assert (row["wanted"], row["wanted_cpu"], row["pairs"]) == (1.6, 0.5, 1)
    assert "hit-rr-32" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.svg"]


def test_trace_that_is_replayed_fits_on_the_disk_and_has_all_kinds(tmp_path):
    job = BY_NAME["mix-fs"]
    with Stand(tmp_path) as stand:
        lines = stand.unpacked(job.trace).read_text().splitlines()
    assert lines[0] == "fio version 2 iolog"
    requests = [line.split() for line in lines[3:-1]]
    assert {words[1] for words in requests} == {"read", "write", "sync"}
    assert max(int(words[2]) + int(words[3]) for words in requests) <= min(job.size, job.small)
