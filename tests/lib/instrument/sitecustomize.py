# SPDX-License-Identifier: Apache-2.0
"""What an interpreter that runs with a sanitizer (tests/sanitized.py) does first.

The sanitizer's library has to be in the process before all others, so the interpreter is started
with it preloaded. Other programs break under it, or are slow, and are none of our business: what
this process starts gets no library, unless it is an interpreter like this one.
"""

import os
import sys

if os.environ.pop("LD_PRELOAD", None) and "FVD_INTERPRETER" in os.environ:
    sys.executable = os.environ["FVD_INTERPRETER"]
