# SPDX-License-Identifier: Apache-2.0
"""One module for each group of verbs; main.py imports them when a verb is called."""
