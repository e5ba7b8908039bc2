# SPDX-License-Identifier: Apache-2.0
"""`fvdd`: arguments, configuration, logging, run the app, exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace

from fvdapi.errors import ApiError
from fvdd import log
from fvdd.config import DEFAULT_CONFIG, Config, check, load
from fvdd.priority import hurry


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        config = effective_config(options)
        log.setup(config.daemon.log_level)
        hurry()
        asyncio.run(_run(config))
    except ApiError as error:
        sys.stderr.write(f"fvdd: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def effective_config(options: argparse.Namespace) -> Config:
    """The file's values, with those of the command line in their place."""
    config = load(options.config)
    given = {
        "socket": options.socket,
        "state_dir": options.state_dir,
        "metrics": options.metrics,
        "log_level": options.log_level,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    config = replace(config, daemon=replace(config.daemon, **changes))
    check(config, "command line")
    return config


async def _run(config: Config) -> None:
    # Imported late: a wrong configuration is reported without loading the web framework.
    from fvdd.app import App

    await App(config).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fvdd",
        description="Attach FVD images as block devices: the daemon that fvdctl talks to.",
    )
    parser.add_argument("--config", metavar="FILE", help=f"TOML file (default {DEFAULT_CONFIG})")
    parser.add_argument("--socket", metavar="PATH", help="control socket (/run/fvd/fvdd.sock)")
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="serve /metrics there too, or off (127.0.0.1:9809)"
    )
    parser.add_argument("--state-dir", metavar="DIR", help="live state, on a tmpfs (/run/fvd)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    return parser
