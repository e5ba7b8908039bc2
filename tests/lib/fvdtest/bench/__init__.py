# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite behind `make bench`: servers and jobs as tables, runs in turn, ratios."""
