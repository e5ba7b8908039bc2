# SPDX-License-Identifier: Apache-2.0
"""`make panels`: what was sampled fills every panel, is drawn, and a panel without data is told."""

import json
import subprocess
import sys

import pytest

from fvdtest import tree
from fvdtest.daemon import wait_until

DEMO = tree.ROOT / "tests/demo"
SAMPLES = 24


def draw(samples, out):
    return subprocess.run(
        [sys.executable, "-P", DEMO / "panels.py", samples, out],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples(observed, tmp_path_factory):
    """Some seconds of what the fvdd under load and the node_exporter beside it say."""
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    path.touch()
    address = observed.metrics.removeprefix("http://").removesuffix("/metrics")
    words = [f"fvd={address}", f"node={observed.node.address}"]
    process = subprocess.Popen([sys.executable, "-P", DEMO / "sampler.py", path, *words])
    try:
        wait_until(lambda: path.read_text().count("\n") >= SAMPLES, "samples", 60)
    finally:
        process.terminate()
        assert process.wait(30) == 0
    return path


def test_every_panel_has_its_series_and_is_in_the_picture(samples, tmp_path):
    done = draw(samples, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "panels.json").read_text())
    shipped = [
        json.loads((tree.ROOT / f"packaging/grafana/{name}.json").read_text())["panels"]
        for name in ("fvd-fleet", "fvd-device")
    ]
    titles = [one["title"] for panels in shipped for one in panels if one["type"] != "row"]
    assert [one["panel"] for one in found] == titles
    assert all(one["series"] for one in found)
    assert (tmp_path / "panels.html").read_text().count("<svg") == len(titles)
    assert (tmp_path / "panels.png").read_bytes()[:4] == b"\x89PNG"


def test_a_panel_without_series_is_named_and_fails(samples, tmp_path):
    cut = tmp_path / "samples.jsonl"
    cut.write_text(samples.read_text().replace("fvd_device_stalled_seconds_total", "x"))
    done = draw(cut, tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("WITHOUT SERIES: Stalled\n")
