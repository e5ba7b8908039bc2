# SPDX-License-Identifier: Apache-2.0
"""Programs of ours that jobs run to their end."""

from __future__ import annotations

import subprocess

from fvdtest.bench.stand import StandError, environment


def run(words: list[str]) -> str:
    """Run it; its output. StandError has its words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise StandError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout
