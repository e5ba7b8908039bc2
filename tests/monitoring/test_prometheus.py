# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real fvdd under load; every expression that we ship gives data."""

from __future__ import annotations

import json
import math
import re
import subprocess
from functools import partial
from typing import Any

import pytest

from fvdtest import tree
from fvdtest.daemon import wait_until
from fvdtest.prometheus import fetch

from .conftest import BASE_SIZE, Observed

RATE_INTERVAL = "30s"
PLACES = {"$instance": ".*", "$device": ".*", "$__rate_interval": RATE_INTERVAL}


def panel_queries() -> list[Any]:
    found = []
    for path in sorted((tree.ROOT / "packaging/grafana").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                name = f"{path.stem}-{panel['title']}-{target['refId']}"
                found.append(pytest.param(panel["type"], target, id=name))
    return found


def filled(expr: str) -> str:
    for place, value in PLACES.items():
        # Where one is chosen, all are meant here: each has what another lacks.
        expr = expr.replace(f'="{place}"', f'=~"{value}"').replace(place, value)
    assert "$" not in expr, expr
    return expr


@pytest.mark.parametrize(("kind", "target"), panel_queries())
def test_panel_has_data(observed: Observed, kind: str, target: dict[str, Any]) -> None:
    expr = filled(target["expr"])
    samples = wait_until(lambda: observed.prometheus.query(expr), f"data of {expr}")
    wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    for sample in samples:
        assert wanted <= set(sample["metric"]), sample
    if kind == "stat":
        assert len(samples) == 1
    numbers = [float(sample["value"][1]) for sample in samples]
    assert all(number >= 0 or math.isnan(number) for number in numbers if "predict" not in expr)
    # In a graph, data are needed over a range as well.
    if kind in ("timeseries", "heatmap", "state-timeline"):
        assert target["range"]
        assert not target["instant"]


def test_rules_are_evaluated_and_give_what_they_are_named_for(observed: Observed) -> None:
    def all_evaluated() -> list[dict[str, Any]] | None:
        groups = observed.prometheus.api("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else None

    rules = wait_until(all_evaluated, "all rules to be evaluated")
    assert len(rules) == len(re.findall(r"^ +- (?:alert|record):", _rules_text(), re.M))
    for rule in rules:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            name = rule["name"]
            samples = wait_until(partial(observed.prometheus.query, name), name)
            assert all("device" in sample["metric"] for sample in samples)


def test_every_alert_has_something_to_compare(observed: Observed) -> None:
    """With comparisons that answer 0 or 1, each expression has series of the scraped devices."""
    groups = observed.prometheus.api("rules")["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if rule["type"] == "alerting"]
    tried = 0
    for rule in alerts:
        if "node_" in rule["query"]:  # not collected here: of mounted file systems, of textfiles
            continue
        expr = re.sub(r" (==|!=|<|>) (?=[\d(a-z])", r" \1 bool ", rule["query"])
        samples = wait_until(partial(observed.prometheus.query, expr), f"{rule['name']}: {expr}")
        assert all({"instance"} <= set(sample["metric"]) for sample in samples), rule["name"]
        tried += 1
    assert tried == len(alerts) - 4


def test_every_metric_that_an_alert_reads_is_there(observed: Observed) -> None:
    """A rule over a name that nobody exposes would never fire."""
    text = fetch(observed.metrics)
    for expr in re.findall(r"^ +expr: (.*?)(?=^ +(?:for|labels|- ))", _rules_text(), re.M | re.S):
        for name in re.findall(r"(?<![\w:])fvd_[a-z0-9_]+", expr):
            assert re.search(rf"^{name}(?:{{| )", text, re.M), name


def test_what_a_scrape_says_is_well_formed_and_documented(observed: Observed) -> None:
    text = fetch(observed.metrics)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    runbook = (tree.ROOT / "packaging/prometheus/README.md").read_text()
    for name in re.findall(r"^# TYPE (fvd_\S+)", text, re.M):
        assert re.search(rf"`{name}[`{{]", runbook), f"the README does not explain {name}"


def test_the_readme_explains_no_metric_that_is_not_there(observed: Observed) -> None:
    text = fetch(observed.metrics)
    runbook = (tree.ROOT / "packaging/prometheus/README.md").read_text()
    tables = runbook[runbook.index("## Every metric") : runbook.index("## Three examples")]
    for name in re.findall(r"`(fvd_\w+)", tables):
        assert re.search(rf"^# TYPE {name} ", text, re.M), name


def test_the_kernels_disk_metrics_join_by_device(observed: Observed) -> None:
    expr = (
        "node_disk_reads_completed_total"
        " * on (instance, device) group_left (name, image) fvd_device_info"
    )
    samples = observed.prometheus.query(expr)
    assert {sample["metric"]["name"] for sample in samples} == {
        "copies", "fetches", "small-journal",
    }  # fmt: skip


def test_node_exporter_passes_our_textfile_on(observed: Observed) -> None:
    path = observed.node.textfiles / "fvd.prom"
    observed.daemon.ctl("metrics", "--textfile", path)
    samples = wait_until(
        lambda: observed.prometheus.query('fvd_virtual_size_bytes{job="node"}'), "it to be scraped"
    )
    path.unlink()
    assert [float(sample["value"][1]) for sample in samples] == [BASE_SIZE] * 3
    assert observed.prometheus.query("node_textfile_scrape_error == 0")
    assert observed.prometheus.value('sum(up{job="node"})') == 1


def test_nothing_fires_but_what_is_meant_to(observed: Observed) -> None:
    firing = observed.prometheus.query('ALERTS{alertstate="firing"}')
    assert firing == []


def _rules_text() -> str:
    return (tree.ROOT / "packaging/prometheus/fvd.rules.yml").read_text()
