# SPDX-License-Identifier: Apache-2.0
"""Drives the simulator: scenarios, runs, campaigns. The simulator itself is tests/native/sim_*."""
