# SPDX-License-Identifier: Apache-2.0
"""Devices: their states, their workers, their registry."""
