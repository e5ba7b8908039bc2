# SPDX-License-Identifier: Apache-2.0
"""`fvdctl trace`: the file has exactly the requests of its time, whoever dies meanwhile."""

import itertools
import json
import os
import signal
import subprocess

import pytest

from fvdapi.errors import ApiError
from fvdapi.tracing import REQUEST, TraceReader
from fvdctl.chrome_trace import BEGIN
from fvdtest.chrome_schema import Begin, Complete, read_chrome_trace
from fvdtest.daemon import FVDCTL, wait_until

BLOCK = 4096


class Tracing:
    """`fvdctl trace` beside the test, its trace begun."""

    def __init__(self, daemon, path, seconds):
        self.path = path
        words = [*FVDCTL, "trace", "web", str(path), "--seconds", str(seconds), "--json"]
        self.process = subprocess.Popen(
            [*words, "--socket", str(daemon.socket)], stdout=subprocess.PIPE, text=True
        )
        wait_until(self.has_begun, "the trace to begin")

    def has_begun(self):
        assert self.process.poll() is None
        return "traceEvents" in self.text()

    def text(self):
        """What is there of the file that is being written."""
        found = list(self.path.parent.glob(f"{self.path.name}.*"))
        return found[0].read_text() if found else ""

    def end(self):
        facts, _ = self.process.communicate(timeout=60)
        return json.loads(facts) if facts else None


@pytest.fixture
def trace(daemon, tmp_path):
    running = []

    def begin(seconds):
        running.append(Tracing(daemon, tmp_path / "out" / "trace.json", seconds))
        return running[-1]

    (tmp_path / "out").mkdir()
    yield begin
    for one in running:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()


@pytest.fixture
def disk(daemon, clone):
    return daemon.attach(clone("web", "--copy-on-read")[0], "--wait", "node")


def requests(file):
    return [
        (event.name, event.args["offset"], event.args["length"])
        for event in file.traceEvents
        if isinstance(event, Begin)
    ]


def work(disk):
    """A script, and what of it must be in a trace."""
    done = []
    for number in range(20):
        disk.read(number * BLOCK, 3 * BLOCK)
        disk.write((100 + number) * BLOCK + 5, b"w" * 1000)
        done += [("read", number * BLOCK, 3 * BLOCK), ("write", (100 + number) * BLOCK + 5, 1000)]
    disk.flush()
    disk.trim(100 * BLOCK, BLOCK)
    disk.write_zeroes(300 * BLOCK, 2 * BLOCK)
    disk.write(310 * BLOCK, b"f" * BLOCK, fua=True)
    return [
        *done,
        ("flush", 0, 0),
        ("discard", 100 * BLOCK, BLOCK),
        ("write_zeroes", 300 * BLOCK, 2 * BLOCK),
        ("write", 310 * BLOCK, BLOCK),
    ]


def test_a_trace_has_exactly_the_requests_of_the_script(daemon, disk, trace):
    before = daemon.metrics()
    running = trace(600)
    done = work(disk)
    wait_until(lambda: daemon.metrics()["fvd_cor_outstanding_bytes", (("device", "nbd0"),)] == 0,
               "copies to end")  # fmt: skip
    # An interrupt ends it, and what was watched is kept.
    wait_until(lambda: running.text().count('"ph": "e"') == len(done), "the requests in the file")
    running.process.send_signal(signal.SIGINT)
    facts = running.end()
    file = read_chrome_trace(running.path)
    assert requests(file) == done
    assert (facts["requests"], facts["lost_events"], facts["cut_off"]) == (len(done), 0, True)
    after = daemon.metrics()

    def counted(name, **labels):
        key = (name, tuple(sorted({"device": "nbd0", **labels}.items())))
        return after[key] - before[key]

    spans = [event for event in file.traceEvents if isinstance(event, Complete)]
    for reason in ("demand", "cow"):
        of_base = [e for e in spans if e.name == f"base read: {reason}"]
        assert len(of_base) > 0
        assert len(of_base) == counted("fvd_base_requests_total", reason=reason, outcome="ok")
        assert sum(e.args["length"] for e in of_base) == counted(
            "fvd_base_bytes_total", reason=reason
        )
    copies = [e.args["length"] for e in spans if e.cat == "copy"]
    assert sum(copies) == counted("fvd_cor_bytes_total") > 0
    flushes = [e for e in spans if e.name == "flush of the image"]
    assert len(flushes) == counted("fvd_image_flushes_total")
    commits = [e for e in spans if e.name == "commit"]
    assert len(commits) == counted("fvd_journal_commits_total")


def test_it_ends_by_itself_and_tells_what_is_in_it(daemon, disk, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(BEGIN + "an earlier one")
    done = daemon.ctl("trace", "web", path, "--seconds", "0.3")
    assert done.stderr == f"{path}: 0 requests, 0 events\n"
    file = read_chrome_trace(path)
    assert (file.otherData["cut_off"], file.otherData["lost_events"]) == (False, 0)
    assert file.otherData["image"].endswith("web.fvd")
    # Nothing is left of it: another can be taken at once.
    daemon.ctl("trace", "web", path, "--seconds", "0.1")


def test_prefetch_is_in_it_with_each_byte_once(daemon, clone, trace):
    daemon.attach(clone("web", "--prefetch-delay", "off")[0], "--wait", "node")
    running = trace(600)
    daemon.ctl("prefetch", "web", "start")
    daemon.ctl("prefetch", "web", "wait")
    daemon.ctl("detach", "web")
    assert running.end()["cut_off"] is True
    file = read_chrome_trace(running.path)
    stored = [e for e in file.traceEvents if isinstance(e, Complete) and e.cat == "prefetch"]
    assert sum(e.args["length"] for e in stored) == 8 << 20
    assert any(getattr(e, "name", "") == "checkpoint" for e in file.traceEvents)


def test_only_one_at_a_time(daemon, disk, trace, tmp_path):
    trace(600)
    second = daemon.ctl("trace", "web", tmp_path / "second", check=False)
    assert second.returncode == 5
    assert second.stderr == (
        "fvdctl: a trace of this device is being taken\nhint: wait for its end\n"
    )
    assert not (tmp_path / "second").exists()


def test_a_reader_that_leaves_ends_the_trace(daemon, disk, trace):
    first = trace(600)
    first.process.kill()
    first.process.wait()
    wait_until(
        lambda: daemon.ctl("trace", "web", first.path, "--seconds", "0.1", check=False).returncode
        == 0,
        "the trace to be given up",
    )


def test_a_worker_that_dies_leaves_what_was_watched(daemon, disk, trace):
    running = trace(600)
    disk.read(0, BLOCK)
    wait_until(lambda: '"read"' in running.text(), "the read in the file")
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    assert running.end()["cut_off"] is True
    assert ("read", 0, BLOCK) in requests(read_chrome_trace(running.path))


def test_a_reader_that_is_late_holds_up_nobody_and_gets_all(daemon, disk):
    disk.write(0, b"w" * BLOCK)
    with daemon.client() as client, client.trace("web", 600) as chunks:
        first = next(chunks)
        for _ in range(500):
            disk.read(0, 512)
        reader = TraceReader(itertools.chain([first], chunks))
        seen = 0
        for events in reader.frames():
            seen += sum(1 for event in events if event.kind == REQUEST)
            if seen == 500:
                break
        assert reader.lost == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing", "x.json"], "there is no device called 'nothing'"),
        (["web", "/nowhere/x.json"], "/nowhere/x.json"),
        (["web", "x.json", "--seconds", "0"], "0"),
        (["web", "x.json", "--seconds", "1e9"], "3600"),
    ],
)
def test_wrong_words_are_refused(daemon, disk, tmp_path, words, said):
    done = daemon.ctl("trace", words[0], tmp_path / words[1], *words[2:], check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.glob("x.json*"))


def test_the_time_is_checked_by_the_daemon_as_well(daemon, disk):
    with daemon.client() as client, pytest.raises(ApiError) as caught, client.trace("web", -1):
        pass
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_early_and_the_file_is_whole(daemon, disk, trace, number):
    running = trace(600)
    disk.read(0, BLOCK)
    running.process.send_signal(number)
    facts = running.end()
    assert running.process.returncode == 0
    assert facts["requests"] >= 1
    assert os.listdir(running.path.parent) == ["trace.json"]
    assert read_chrome_trace(running.path)


def test_a_folder_that_is_not_there_is_named(daemon, disk, tmp_path):
    path = tmp_path / "nowhere" / "trace.json"
    done = daemon.ctl("trace", "web", path, check=False)
    assert done.returncode == 1
    assert f"{path} cannot be written (No such file or directory)" in done.stderr
    assert "internal" not in done.stderr
