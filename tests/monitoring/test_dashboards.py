# SPDX-License-Identifier: Apache-2.0
"""The dashboards: the committed JSON is what the code makes, and keeps Grafana's rules."""

import importlib.util
import json
import re
import sys

import pytest

from fvdtest import tree

FOLDER = tree.ROOT / "packaging/grafana"


def load_dashboards():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("fvd_dashboards", FOLDER / "dashboards.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


MODULE = load_dashboards()
SAVED = sorted(FOLDER.glob("*.json"))
PANELS = [
    pytest.param(panel, id=f"{path.stem}-{panel['title']}")
    for path in SAVED
    for panel in json.loads(path.read_text())["panels"]
    if panel["type"] != "row"
]


def test_committed_files_are_those_that_the_code_makes():
    made = {f"{one.uid}.json": MODULE.written(one) for one in MODULE.DASHBOARDS}
    assert {path.name: path.read_text() for path in SAVED} == made


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(path):
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.parametrize("panel", PANELS)
def test_panel_says_what_it_shows_and_names_only_alerts_that_exist(panel):
    assert panel["description"].endswith(".")
    assert panel["targets"]
    rules = (tree.ROOT / "packaging/prometheus/fvd.rules.yml").read_text()
    for alert in re.findall(r"\bFvd\w+", panel["description"]):
        assert f"alert: {alert}\n" in rules
