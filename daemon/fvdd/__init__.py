# SPDX-License-Identifier: Apache-2.0
"""The fvd daemon, its worker processes and what attaches devices to clients."""
