# SPDX-License-Identifier: Apache-2.0
"""Rows of jobs that no peer does: a measured value against a limit."""

from __future__ import annotations

from fvdtest.bench.figures import Row


def against_limit(
    job: str, value: float, limit: float, unit: str, *, least: bool = False,
    wanted: float | None = 1.0,
) -> Row:  # fmt: skip
    """A row of one measured value; least: it has to be the limit at least, else at most."""
    ratio = value / limit if least else limit / max(value, 1e-9)
    return Row(job, "fvd", "limit", value, limit, ratio, ratio, ratio, 0.0, 0.0, 1,
               wanted=wanted, unit=unit)  # fmt: skip
