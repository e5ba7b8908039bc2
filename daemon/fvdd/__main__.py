# SPDX-License-Identifier: Apache-2.0
"""`python -P -m fvdd`: see main."""

import sys

from fvdd.main import main

if __name__ == "__main__":
    sys.exit(main())
