# SPDX-License-Identifier: Apache-2.0
"""`python -m fvdctl`: the same as the command fvdctl."""

import sys

from fvdctl.main import main

sys.exit(main())
