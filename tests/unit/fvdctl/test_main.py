# SPDX-License-Identifier: Apache-2.0
"""The command line itself: the table of verbs, errors, exit statuses, --debug."""

import sys
import types

import click
import pytest

from fvdctl import main as module
from fvdctl.main import VERBS, cli, main
from fvdengine.errors import EngineError


@pytest.fixture
def verb(monkeypatch):
    """A function that makes `fvdctl probe` run the given function."""

    def install(function):
        fake = types.ModuleType("probe_commands")
        fake.probe = click.command()(function)
        monkeypatch.setitem(sys.modules, "probe_commands", fake)
        monkeypatch.setitem(VERBS, "probe", ("probe_commands:probe", "A probe."))

    return install


class Lost(EngineError):
    code = "lost"
    template = "the {thing} is\nlost"
    hint_template = "Look again."
    exit_status = 7


def failing(error):
    def run():
        raise error

    return run


def test_help_names_every_verb_without_importing_one(capsys):
    before = set(sys.modules)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert not {name for name in set(sys.modules) - before if name.startswith("fvdctl.commands")}


@pytest.mark.parametrize("name", ["create", "info", "check", "map"])
def test_offline_verb_is_found(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"fvdctl {name}" in capsys.readouterr().out


def test_error_is_one_sentence_and_a_hint(verb, capsys):
    verb(failing(Lost(thing="key")))
    assert main(["probe"]) == 7
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "fvdctl: the key is lost\nhint: Look again.\n"


def test_any_error_with_the_four_attributes_is_shown_alike(verb, capsys):
    class Foreign(Exception):
        code, message, hint, exit_status = "x", "it is away", "Come later.", 3

    verb(failing(Foreign()))
    assert main(["probe"]) == 3
    assert capsys.readouterr().err == "fvdctl: it is away\nhint: Come later.\n"


@pytest.mark.parametrize("words", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(verb, capsys, words):
    verb(failing(Lost(thing="key")))
    assert main(words) == 7
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fvdctl: the key is lost\nhint: Look again.\n")


def test_debug_reaches_the_verb(verb):
    seen = []
    verb(lambda: seen.append(click.get_current_context().find_root().params["debug"]))
    assert main(["probe", "--debug"]) == 0
    assert main(["probe"]) == 0
    assert seen == [True, False]


def test_word_behind_two_dashes_is_no_option(capsys):
    assert main(["info", "--", "--debug"]) == 1
    assert capsys.readouterr().err.startswith("fvdctl: --debug does not exist\n")


def test_fault_of_the_program_is_said_so_without_traceback(verb, capsys):
    verb(failing(ZeroDivisionError("division by zero")))
    assert main(["probe"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fvdctl: internal error: ZeroDivisionError: division by zero\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("word", ["attach", "detach", "status"])
def test_a_name_that_is_not_utf8_is_no_fault_of_the_program(word, capsys, tmp_path):
    assert main([word, str(tmp_path / "\udcff.fvd"), "--socket", str(tmp_path / "none")]) != 0
    said = capsys.readouterr().err
    assert "internal error" not in said
    assert ("the name is not UTF-8" in said) == (word == "attach")


@pytest.mark.parametrize(
    "words",
    [("snapshot", "web", "/d" * 3000), ("backup", "web", "/d" * 3000), ("attach", "/d" * 3000),
     ("recover", "web", "--image", "/d" * 3000), ("resize", "web", "9" * 3000)],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_no_request_can_hold_is_said_in_one_sentence(words, capsys, tmp_path):
    assert main([*words, "--socket", str(tmp_path / "none")]) != 0
    said = capsys.readouterr().err
    assert said.startswith("fvdctl: ")
    assert "internal error" not in said
    assert len(said) < 400


def test_system_error_names_the_file(verb, capsys):
    verb(failing(OSError(5, "Input/output error", "/some/file")))
    assert main(["probe"]) == 1
    assert capsys.readouterr().err.startswith("fvdctl: /some/file: Input/output error\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["info"], "Missing argument 'IMAGE'"),
        (["info", "x", "--what"], "No such option"),
        (["create", "x", "1M", "--prefetch-slots", "many"], "'many' is not a valid integer"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exits_1(words, text, capsys):
    assert main(words) == 1
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith("fvdctl: ")
    assert "--help`." in err.splitlines()[-1]


def test_no_verb_shows_the_help(capsys):
    assert main([]) == 1
    assert "Verbs:" in capsys.readouterr().err


def test_interrupt_exits_130(verb, capsys):
    verb(failing(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr().err.strip() == "fvdctl: interrupted"


def test_status_of_a_verb_is_the_exit_status(verb):
    verb(lambda: 3)
    assert main(["probe"]) == 3


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fvdctl ")


def test_table_names_modules_of_ours():
    for place, text in VERBS.values():
        path, _, function = place.partition(":")
        assert path.startswith("fvdctl.commands.")
        assert function.isidentifier()
        assert text.endswith(".")


def test_engine_error_is_a_described_error():
    assert isinstance(Lost(thing="key"), module.DescribedError)
    assert not isinstance(OSError(), module.DescribedError)


def text_parameters():
    """Every parameter that a user can give an empty word for, with the words before and after."""
    context = click.Context(cli)
    for verb in VERBS:
        command = cli.get_command(context, verb)
        arguments = [item for item in command.params if isinstance(item, click.Argument)]
        words = ["on" if item.name == "switch" else "x" for item in arguments if item.required]
        for at in range(len(words)):
            if arguments[at].nargs == 1 and arguments[at].name not in NOT_NAMES:
                yield pytest.param([verb, *words[:at], "", *words[at + 1 :]], id=f"{verb}-{at}")
        for option in command.params:
            is_text = isinstance(option.type, click.types.StringParamType | click.Path)
            if isinstance(option, click.Option) and is_text and option.nargs == 1:
                flag = max(option.opts, key=len)
                yield pytest.param([verb, *words, flag, ""], id=f"{verb}{flag}")


NOT_NAMES = {"size", "action", "state"}


@pytest.mark.parametrize("words", text_parameters())
def test_empty_word_is_refused_wherever_a_name_is_expected(words, capsys):
    status = main(words)
    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert lines[0].startswith("fvdctl: ")
    assert len(lines) == 2
    assert "is empty" in lines[0] or "''" in lines[0]


@pytest.mark.parametrize("name", VERBS)
def test_files_that_may_not_be_read_are_left_to_our_own_errors(name):
    for parameter in cli.get_command(click.Context(cli), name).params:
        kinds = getattr(parameter.type, "types", [parameter.type])
        assert not any(kind.readable for kind in kinds if isinstance(kind, click.Path))
