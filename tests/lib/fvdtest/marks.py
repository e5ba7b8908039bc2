# SPDX-License-Identifier: Apache-2.0
"""Marks that several kinds of tests use."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet


def in_proof(*values: object) -> ParameterSet:
    """Parameters that a test has in `make proof` alone: they differ little from the others."""
    return pytest.param(*values, marks=pytest.mark.proof)
