# SPDX-License-Identifier: Apache-2.0
"""The text that scrapers read: both formats are understood by the reference parsers."""

import math

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from fvdd.metrics.exposition import (
    Exposition,
    exposition_of,
    histogram_template,
    number_text,
)

NAMED = (("device", "100%s"),)
PARSERS = {False: parse_text, True: parse_openmetrics}


def written(openmetrics):
    out = Exposition(openmetrics=openmetrics)
    out.family("fvd_things", "counter", 'Things with "quotes",\nand a \\ too.')
    out.sample("fvd_things_total", (("device", 'a"b\\c\nd'),), 7)
    out.family("fvd_level", "gauge", "A level.")
    out.sample("fvd_level", (), float("nan"))
    out.family("fvd_wait_seconds", "histogram", "Waits.")
    bounds = ("0.5", "2.0", "+Inf")
    out.lines(histogram_template("fvd_wait_seconds", NAMED, bounds) % (1, 1, 3, "9.25", 3))
    return exposition_of([out.text()], openmetrics=openmetrics).decode()


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_reference_parser_reads_what_was_written(openmetrics):
    families = {f.name: f for f in PARSERS[openmetrics](written(openmetrics))}
    assert {name: f.type for name, f in families.items()} == {
        "fvd_things": "counter", "fvd_level": "gauge", "fvd_wait_seconds": "histogram",
    }  # fmt: skip
    assert families["fvd_things"].documentation == 'Things with "quotes",\nand a \\ too.'
    (thing,) = families["fvd_things"].samples
    assert (thing.labels, thing.value) == ({"device": 'a"b\\c\nd'}, 7)
    assert math.isnan(families["fvd_level"].samples[0].value)
    waits = {(s.name, s.labels.get("le")): s.value for s in families["fvd_wait_seconds"].samples}
    assert waits == {
        ("fvd_wait_seconds_bucket", "0.5"): 1, ("fvd_wait_seconds_bucket", "2.0"): 1,
        ("fvd_wait_seconds_bucket", "+Inf"): 3, ("fvd_wait_seconds_sum", None): 9.25,
        ("fvd_wait_seconds_count", None): 3,
    }  # fmt: skip


def test_only_openmetrics_ends_with_a_mark_and_only_once():
    parts = ["# HELP a A.\n# EOF\n", "# HELP b B.\n# EOF\n"]
    assert exposition_of(parts, openmetrics=True) == b"# HELP a A.\n# HELP b B.\n# EOF\n"
    assert exposition_of(parts, openmetrics=False) == b"# HELP a A.\n# HELP b B.\n"


def test_a_name_that_is_no_text_leaves_the_rest_readable():
    out = Exposition()
    out.family("fvd_level", "gauge", "A level.")
    out.sample("fvd_level", (("base", "bad\udcff.img"),), 1)
    found = exposition_of([out.text()], openmetrics=False).decode()
    assert found.endswith('fvd_level{base="bad?.img"} 1\n')


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2**63, "9223372036854775808"), (0.5, "0.5"), (float("inf"), "+Inf"),
     (float("-inf"), "-Inf"), (float("nan"), "NaN")],
)  # fmt: skip
def test_numbers_keep_their_value(value, text):
    assert number_text(value) == text
