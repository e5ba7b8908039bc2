# SPDX-License-Identifier: Apache-2.0
"""Attach and serve say and take the same about copying the base."""

import click
import pytest

from fvdctl.main import cli, main

NAMES = ["--prefetch-policy", "--fetch-size", "--profile"]


def options(verb):
    command = cli.get_command(click.Context(cli), verb)
    found = {name: item for item in command.params for name in item.opts}
    return [found[name] for name in NAMES]


def test_attach_leaves_the_policy_to_the_configuration():
    assert options("attach")[0].default is None
    assert options("serve")[0].default == "polite"
    for one, other in zip(options("attach")[1:], options("serve")[1:], strict=True):
        assert (one.help, one.default, one.multiple) == (other.help, other.default, other.multiple)


@pytest.mark.parametrize("verb", ["attach", "serve"])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--fetch-size", "3M"], "at most 2M"),
        (["--prefetch-policy", "rude"], "'polite', 'eager', 'fixed'"),
        (["--profile", "play", "x"], "'record', 'replay'"),
        (["--profile", "record", ""], "--profile is empty"),
    ],
)
def test_bad_values_are_refused_alike(verb, words, text, capsys):
    assert main([verb, "x.fvd", *words]) == 1
    assert text in capsys.readouterr().err
