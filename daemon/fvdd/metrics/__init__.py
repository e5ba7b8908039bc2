# SPDX-License-Identifier: Apache-2.0
"""Metrics of the daemon and its devices."""
