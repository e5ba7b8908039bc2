# SPDX-License-Identifier: Apache-2.0
"""`python -P -m fvdd.worker`: see main."""

import sys

from fvdd.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
