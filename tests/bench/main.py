#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The command behind `make bench`; all of it is in fvdtest.bench."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from fvdtest.bench import command  # noqa: E402

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
