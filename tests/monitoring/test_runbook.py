# SPDX-License-Identifier: Apache-2.0
"""What the monitoring page tells to look at and to type is there: panels, rows, commands, files."""

import json
import re

import pytest
from click import Context, Group

from fvdctl.main import VERBS, cli
from fvdtest import tree

FOLDER = tree.ROOT / "packaging/prometheus"
TEXT = (FOLDER / "README.md").read_text()
BOARDS = [
    json.loads(path.read_text())
    for path in sorted((tree.ROOT / "packaging/grafana").glob("*.json"))
]
TITLES = {panel["title"] for board in BOARDS for panel in board["panels"]}


def panels_named(text):
    """What stands in asterisks, over line ends, but not in code: panels and rows."""
    text = re.sub(r"`[^`]*`|^    .*$", "", text, flags=re.M)
    return [" ".join(found.split()) for found in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", text)]


def commands_named(text):
    """What stands in backticks, or in a block of its own, and begins with fvdctl."""
    inline = [" ".join(found.split()) for found in re.findall(r"`(fvdctl [^`]+)`", text)]
    return inline + re.findall(r"^    (fvdctl .*)$", text, re.M)


def complaint(command):
    """What is wrong with a command line, or nothing."""
    words = command.split()[1:]
    if words[0] not in VERBS:
        return f"no verb {words[0]}"
    verb = cli.get_command(Context(cli), words[0])
    if isinstance(verb, Group):
        found = [name for name in words[1:] if name in verb.commands]
        if not found:
            return f"no such word of {words[0]}"
        verb = verb.commands[found[0]]
    known = {opt for one in verb.params for opt in (*one.opts, *one.secondary_opts)}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    wrong = [word for word in given if word not in known]
    return f"no option {wrong}" if wrong else ""


@pytest.mark.parametrize("title", sorted(set(panels_named(TEXT))))
def test_panel_is_on_a_dashboard(title):
    assert title in TITLES


@pytest.mark.parametrize("command", sorted(set(commands_named(TEXT))))
def test_command_exists(command):
    assert not complaint(command), command


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_the_number_of_panels_is_told_right():
    count = sum(panel["type"] != "row" for board in BOARDS for panel in board["panels"])
    assert f"All {count} have series" in TEXT


def test_names_that_do_not_exist_are_noticed():
    text = "see *Base link* and *p99\nby source*, not **this** `or_*` that `*_too`"
    assert panels_named(text) == ["Base link", "p99 by source"]
    assert commands_named("`fvdctl prefetch NAME\nstart` or\n\n    fvdctl nothing x\n") == [
        "fvdctl prefetch NAME start", "fvdctl nothing x",
    ]  # fmt: skip
    assert complaint("fvdctl nothing x") == "no verb nothing"
    assert "no option" in complaint("fvdctl recover web --discard-everything")
    assert complaint("fvdctl recover web --discard-unflushed") == ""
