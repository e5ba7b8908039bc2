#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fuzz one target for some seconds; what breaks it is kept in tests/fuzz/found and runs for ever.

Usage: main.py TARGET SECONDS [FOUND]. Coverage guides the search through the Python code (images,
the handshake); what is native sees the same bytes.
"""

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lib"))

with atheris.instrument_imports(include=["fvdengine", "fvdd.attach"]):
    from fvdtest.fuzzing import TARGETS


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2]
    found = Path(sys.argv[3]) if len(sys.argv) > 3 else HERE / "found" / name
    found.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fvd-fuzz.") as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / f"seed{number}").write_bytes(seed)
        options = [
            f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=2048",
            f"-artifact_prefix={found}/", "-print_final_stats=1", "-max_len=262144",
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options, corpus], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
