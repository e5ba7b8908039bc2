# SPDX-License-Identifier: Apache-2.0
"""What an interpreter that runs with a sanitizer (tests/sanitized.py) does first.

The sanitizer's library has to be in the process before all others, so the interpreter is started
with it preloaded. Other programs break under it, or are slow, and are none of our business: what
this process starts gets no library, unless it is an interpreter like this one.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

CONFINEMENT = "fvdd.worker.confinement"


class Unconfined(SourceFileLoader):
    """Leaves a worker what its sanitizer needs: a report is a new file, which a confined one must
    not make; and the sanitizer of threads keeps back the signal by which threads are limited."""

    def exec_module(self, module: ModuleType) -> None:
        """Let confine() do nothing."""
        super().exec_module(module)
        vars(module)["confine"] = lambda needs: None


class Finder(MetaPathFinder):
    """Finds that module alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As any other, with a loader of our own."""
        spec = PathFinder.find_spec(fullname, path) if fullname == CONFINEMENT else None
        if spec is not None and spec.origin is not None:
            spec.loader = Unconfined(fullname, spec.origin)
        return spec


if os.environ.pop("LD_PRELOAD", None) and "FVD_INTERPRETER" in os.environ:
    sys.executable = os.environ["FVD_INTERPRETER"]
    sys.meta_path.insert(0, Finder())
