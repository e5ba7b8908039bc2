# SPDX-License-Identifier: Apache-2.0
"""The process that holds one open image, and the way to talk to it."""
