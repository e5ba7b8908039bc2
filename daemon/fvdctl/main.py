# SPDX-License-Identifier: Apache-2.0
"""The command fvdctl: find the verb, run it, turn every error into one sentence and a hint.

Verbs are imported when they are called, so that `fvdctl info` pays for no HTTP client and the
offline verbs work where the daemon's packages are missing. Exit status: that of the error, 1 for
wrong usage (2 and 3 mean something in `check`), 130 after an interrupt.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import click
from click.core import ParameterSource

from fvdctl.output import printable

# verb -> (module:function, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "create": ("fvdctl.commands.image:create", "Make a new image, usually a clone of a base."),
    "info": ("fvdctl.commands.image:info", "Show what an image says about itself."),
    "check": ("fvdctl.commands.upkeep:check", "Verify an image."),
    "map": ("fvdctl.commands.image:map_", "Show where each part of an image comes from."),
    "update": ("fvdctl.commands.upkeep:update", "Change how an image is run."),
    "resize": ("fvdctl.commands.upkeep:resize", "Change the size of an image's disk."),
    "serve": ("fvdctl.commands.serve:serve", "Export an image as an NBD server, no root needed."),
    "attach": ("fvdctl.commands.device:attach", "Attach an image as /dev/nbdN."),
    "boot": ("fvdctl.commands.lifecycle:boot", "Attach a device of /etc/fvd/fvdtab."),
    "detach": ("fvdctl.commands.device:detach", "Detach a device."),
    "list": ("fvdctl.commands.device:list_", "List the attached devices."),
    "status": ("fvdctl.commands.device:status", "Show one device, or all."),
    "snapshot": (
        "fvdctl.commands.lifecycle:snapshot", "Keep a device's image, and continue on a new one.",
    ),
    "backup": ("fvdctl.commands.lifecycle:backup", "Copy a disk in use to a file."),
    "set-read-only": (
        "fvdctl.commands.lifecycle:set_read_only", "Make a device read-only, or writable again.",
    ),
    "upgrade": ("fvdctl.commands.lifecycle:upgrade", "Replace workers by the installed version."),
    "recover": ("fvdctl.commands.lifecycle:recover", "Bring a failed device back to life."),
    "top": ("fvdctl.commands.top:top", "Watch what devices are doing."),
    "events": ("fvdctl.commands.events:events", "Print what happens to devices, as it comes."),
    "trace": ("fvdctl.commands.trace:trace", "Write what a device does, for Perfetto."),
    "prefetch": ("fvdctl.commands.prefetch:prefetch", "Control the prefetch of a device."),
    "doctor": ("fvdctl.commands.system:doctor", "Say what this host can do and what is missing."),
    "metrics": ("fvdctl.commands.metrics:metrics", "Print the metrics of the daemon."),
}

EXIT_USAGE = 1
EXIT_INTERRUPT = 130


@runtime_checkable
class DescribedError(Protocol):
    """What the errors of the engine and of the API client have in common."""

    code: str
    message: str
    hint: str
    exit_status: int


def _refuse_empty(parameter: click.Parameter) -> None:
    """Refuse an empty word, of an unset variable in a script, wherever a value is expected; some
    verbs would take it for the present folder, others for "not given"."""
    given = parameter.callback
    if isinstance(given, _NotEmpty) or parameter.nargs == -1:  # KEY=VALUE words say more themselves
        return
    parameter.callback = _NotEmpty(given)


class _NotEmpty:
    def __init__(self, then: Callable[[click.Context, click.Parameter, Any], Any] | None) -> None:
        self._then = then

    def __call__(self, ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        source = ctx.get_parameter_source(parameter.name or "")
        if source is ParameterSource.COMMANDLINE and _has_empty(value):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else None
            raise click.UsageError(f"{name or parameter.human_readable_name} is empty", ctx)
        return value if self._then is None else self._then(ctx, parameter, value)


def _has_empty(value: object) -> bool:
    if isinstance(value, tuple):
        return any(_has_empty(item) for item in value)
    return isinstance(value, str) and not value.strip()


class LazyGroup(click.Group):
    """A group whose commands are imported on use; help needs the table alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, function = VERBS[cmd_name][0].partition(":")
        command = getattr(import_module(module), function)
        assert isinstance(command, click.Command)
        for parameter in command.params:
            _refuse_empty(parameter)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


def _print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib import metadata  # dear, and of no use to any other command

        try:
            version = metadata.version("fvd")
        except metadata.PackageNotFoundError:
            version = "unknown"
        click.echo(f"fvdctl {version}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error (works anywhere).")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli(debug: bool) -> None:
    """Thin-clone block devices: make, attach and look after FVD images."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # started with it closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:  # accepted behind the verb as well
        rest = [word for word in options if word != "--debug"]
        words = ["--debug", *rest, *words[len(options) :]]
    try:
        status = cli.main(words, prog_name="fvdctl", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except Exception as error:  # the one place where errors end
        if debug and not isinstance(error, click.exceptions.NoArgsIsHelpError):
            traceback.print_exc()
        return _report(error, words)
    except KeyboardInterrupt:
        click.echo("fvdctl: interrupted", err=True)
        return EXIT_INTERRUPT


def _report(error: Exception, words: Sequence[str]) -> int:
    """Print the sentence and the hint for `error`; return the exit status."""
    if isinstance(error, click.Abort):
        _print_error("interrupted", "")
        return EXIT_INTERRUPT
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return EXIT_USAGE
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "fvdctl"
        _print_error(error.format_message(), f"See `{command} --help`.")
        return EXIT_USAGE
    if isinstance(error, click.ClickException):
        _print_error(error.format_message(), "")
        return error.exit_code
    if isinstance(error, DescribedError):
        _print_error(error.message, error.hint)
        return int(error.exit_status)
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone: nothing to say, and nothing more may be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}", "Run it again with --debug for details.")
        return 1
    odd = [word for word in words if not _is_utf8(word)]
    if odd and isinstance(error, ValueError):
        _print_error(
            f"{odd[0]} cannot be told to fvdd: the name is not UTF-8",
            "Rename the file, or make a link to it that has another name.",
        )
        return 1
    if isinstance(error, ValueError) and "fvdapi.models" in sys.modules:
        from fvdapi.models import refusal

        if text := refusal(error):
            _print_error(text, "")
            return 1
    _print_error(
        f"internal error: {type(error).__name__}: {error}",
        "This is a fault of fvdctl; run it again with --debug and report what it prints.",
    )
    return 1


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _print_error(message: str, hint: str) -> None:
    # Names of untrusted images are part of the sentence: a terminal must not act on them.
    click.echo(f"fvdctl: {printable(' '.join(message.split()))}", err=True)
    if hint:
        click.echo(f"hint: {printable(hint)}", err=True)
