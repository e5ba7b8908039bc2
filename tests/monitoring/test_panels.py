# SPDX-License-Identifier: Apache-2.0
"""`make panels`: what Prometheus scraped fills every panel, is drawn, and an empty one is told."""

import json
import subprocess
import sys
import time

import pytest

from fvdtest import tree

DEMO = tree.ROOT / "tests/demo"


def panels(*words):
    return subprocess.run(
        [sys.executable, "-P", DEMO / "panels.py", *map(str, words)],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(observed, tmp_path_factory):
    """What the Prometheus that scrapes an fvdd under load has for the last seconds."""
    path = tmp_path_factory.mktemp("asked") / "asked.json"
    done = panels("ask", observed.prometheus.address, time.time() - 20, time.time(), path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_every_panel_has_its_series_and_is_in_the_picture(asked, tmp_path):
    done = panels("draw", asked, tmp_path)
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


def test_a_panel_without_series_is_named_and_fails(asked, tmp_path):
    cut = json.loads(asked.read_text())
    (stalled,) = (one for one in cut["panels"] if one["panel"] == "Stalled")
    stalled["lines"] = []
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(cut))
    done = panels("draw", path, tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("WITHOUT SERIES: Stalled\n")
