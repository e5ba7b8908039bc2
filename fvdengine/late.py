# SPDX-License-Identifier: Apache-2.0
"""A base on storage that does not answer when its image is opened.

Then a child opens it, for as long as that takes, and serves it as an NBD server does from then on
(late_base.py). To this process it is a server that cannot be reached yet: what is local is served,
and the rest waits. The child is told what the base must be, and serves nothing else.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fvdengine.children import start_child
from fvdengine.remote import Remembered, Remote


@dataclass(frozen=True, slots=True)
class LateBase:
    """What a child needs to open a base as its image would: how the image names it, where the image
    lies, what the policy is. `kind`, `id` (hexadecimal) and `length` are what it is recognised by,
    of kind 0 it is not known."""

    name: str
    format: str
    image_path: str
    directory: str
    allow_dirs: Sequence[str]
    allow_uris: Sequence[str]
    kind: int
    id: str
    length: int
    accept_changed: bool
    base_timeout: float

    @property
    def path(self) -> str:
        """The base, with its symlinks."""
        return os.path.join(self.directory, self.name)


def can_serve(image_format: str) -> bool:
    """Whether the program that a child needs for this format is there."""
    program = {"raw": "nbdkit", "fvd": sys.executable}.get(image_format, "qemu-nbd")
    return shutil.which(program) is not None


def open_late(base: LateBase, known: Remembered) -> tuple[Remote, str]:
    """Start the child; the base and a warning. The caller closes `keeper`."""
    spec = json.dumps(asdict(base))
    child = start_child(
        lambda socket: [sys.executable, "-P", "-m", "fvdengine.late_base", socket, spec]
    )
    warning = (
        f"the storage of the base {base.path} does not answer: what is not local waits for it"
    )
    remote = Remote(
        child.uri, child.keeper, known.length, False, known.is_exact, is_late=True
    )
    return remote, warning
