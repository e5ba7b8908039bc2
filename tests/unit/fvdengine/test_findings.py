# SPDX-License-Identifier: Apache-2.0
"""Findings as data, and the exit status that the worst of them leads to."""

import pytest

from fvdengine.errors import ImageTruncated, NoPermission
from fvdengine.findings import CheckResult, Severity


@pytest.mark.parametrize(
    ("severities", "status"),
    [
        ([], 0),
        ([Severity.NOTE], 0),
        ([Severity.LEAK, Severity.NOTE], 3),
        ([Severity.LEAK, Severity.UNCHECKED], 1),
        ([Severity.UNCHECKED, Severity.LEAK, Severity.CORRUPT], 2),
    ],
)
def test_exit_status_is_that_of_the_worst(severities, status):
    result = CheckResult("x")
    for severity in severities:
        result.add(severity, "code", "message", where="here")
    assert result.exit_status == status


def test_error_becomes_a_finding_with_its_hint():
    result = CheckResult("x")
    result.add_error(ImageTruncated(path="x", actual=1, needed=2), where="file")
    result.add_error(NoPermission(path="x", action="read"), where="base", remedy="do that")
    assert [(f.severity, f.code, f.where) for f in result.findings] == [
        (Severity.CORRUPT, "image_truncated", "file"),
        (Severity.UNCHECKED, "no_permission", "base"),
    ]
    assert result.findings[0].remedy == ImageTruncated.hint_template
    assert result.findings[1].remedy == "do that"


def test_result_is_plain_data():
    result = CheckResult("x", blocks=3)
    result.add(Severity.LEAK, "code", "message", where="here", remedy="that")
    data = result.as_dict()
    assert data["findings"] == [
        {"severity": "leak", "code": "code", "message": "message", "where": "here",
         "remedy": "that"}
    ]  # fmt: skip
    assert data["exit_status"] == 3
    assert data["blocks"] == 3
    assert data["journal"]["torn"] == 0
