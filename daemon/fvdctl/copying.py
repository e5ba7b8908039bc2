# SPDX-License-Identifier: Apache-2.0
"""The options of attach and serve that say how the base is copied: one text, one set of rules."""

from collections.abc import Callable
from typing import Any

import click

from fvdctl.output import SIZE, at_most

FETCH_SIZE_MAX = 2 << 20

Command = Callable[..., Any]


def copying_options(default_policy: str | None) -> Callable[[Command], Command]:
    """Add --prefetch-policy, --fetch-size and --profile; without a default the policy is left to
    the daemon's configuration."""
    whose = "" if default_policy else ", whatever the configuration says"
    policy = click.option(
        "--prefetch-policy",
        type=click.Choice(["polite", "eager", "fixed"]),
        default=default_policy,
        show_default=bool(default_policy),
        help=f"How the copy of the rest of the base behaves beside reads and writes{whose}: "
        "polite steps aside.",
    )
    size = click.option(
        "--fetch-size",
        type=SIZE,
        callback=at_most(FETCH_SIZE_MAX),
        metavar="SIZE",
        help="Read so much at once from a distant base where copy-on-read keeps it.  "
        "[default: 128k]",
    )
    profile = click.option(
        "--profile",
        type=(click.Choice(["record", "replay"]), click.Path(dir_okay=False, readable=False)),
        multiple=True,
        metavar="record|replay FILE",
        help="Note in FILE in which order the base is first read, or prefetch in such an order.",
    )

    def add(command: Command) -> Command:
        return policy(size(profile(command)))

    return add
