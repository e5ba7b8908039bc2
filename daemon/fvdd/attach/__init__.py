# SPDX-License-Identifier: Apache-2.0
"""The ways in which a device reaches its users: NBD exports and kernel devices."""
