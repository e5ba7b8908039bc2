# SPDX-License-Identifier: Apache-2.0
"""Whether somebody else has opened the image of a device for writing while nobody held it."""

from collections.abc import Sequence
from pathlib import Path

from fvdd.worker.failure import OPENED_SINCE, Failure
from fvdengine.header import Header
from fvdengine.live import live_session
from fvdengine.overlay import session_in


def check_session(
    image: str, sessions: Sequence[str], live_dir: Path | None, header: Header
) -> None:
    """Failure unless the image has one of the `sessions`, if any are known, or that of the live
    state there: an opening of ours that did not get far."""
    found = session_in(header)
    if not sessions or found in sessions:
        return
    left = live_session(live_dir) if live_dir is not None else None
    if left is not None and left.hex() == found:
        return
    raise Failure(
        OPENED_SINCE,
        f"{image} was opened for writing by somebody else since the device had it open",
        "see what was done to it; to go on with what it holds now: "
        "fvdctl recover NAME --discard-unflushed",
    )
