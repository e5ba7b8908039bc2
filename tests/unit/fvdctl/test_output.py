# SPDX-License-Identifier: Apache-2.0
"""What the verbs print with."""

import json

import pytest

from fvdctl import output
from fvdctl.main import main
from fvdengine.errors import InvalidOption, InvalidSize


def test_json_is_json(capsys):
    output.emit_json({"a": [1, "ü"]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, "ü"]}


@pytest.mark.parametrize("values", [[], [{"a": 1}], [1, 2, 3]], ids=["none", "one", "three"])
def test_streamed_list_is_json(capsys, values):
    output.emit_json_list(iter(values))
    assert json.loads(capsys.readouterr().out) == values


def test_table_is_aligned(capsys):
    output.table(["name", "size"], [["a", "1M"], ["long name", "512k"]])
    assert capsys.readouterr().out.splitlines() == [
        "name       size",
        "a            1M",
        "long name  512k",
    ]


def test_table_without_rows_has_its_headings(capsys):
    output.table(["name", "size"], [])
    assert capsys.readouterr().out == "name  size\n"


def test_names_cannot_command_the_terminal(capsys):
    output.table(["name"], [["a\x1b[31m\n"]])
    output.pairs([("x", "\x07")])
    output.warn(["\x1b]0;x\x07"])
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\x07" not in captured.out + captured.err


def test_quiet_prints_no_warnings(capsys):
    output.warn(["careful"], quiet=True)
    assert capsys.readouterr().err == ""
    output.warn(["careful"])
    assert capsys.readouterr().err == "fvdctl: warning: careful\n"


def test_unknown_size_is_a_dash():
    assert output.size_text(None) == "-"
    assert output.size_text(4096) == "4k"


def test_size_option_reads_sizes():
    assert output.SIZE.convert("4k", None, None) == 4096
    assert output.SIZE.convert(7, None, None) == 7
    with pytest.raises(InvalidSize):
        output.SIZE.convert("many", None, None)


def test_delay_option_reads_seconds_and_off():
    assert output.DELAY.convert("off", None, None) == -1
    assert output.DELAY.convert("30", None, None) == 30
    for text in ("-1", "soon", "", "1.5"):
        with pytest.raises(InvalidOption):
            output.DELAY.convert(text, None, None)


def test_progress_is_silent_where_there_is_no_terminal(capsys):
    with output.progress("copying", 10) as advance:
        advance(5)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_progress_shows_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress("copying", 10, quiet=True) as quiet:
        quiet(5)
    assert capsys.readouterr().err == ""
    with output.progress("copying", 10) as advance:
        advance(10)
    assert "copying" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [("top", "--interval", "nan"), ("top", "--interval", "inf"), ("top", "--interval", "0"),
     ("trace", "web", "file", "--seconds", "nan"), ("prefetch", "web", "wait", "--timeout", "nan"),
     ("serve", "x.fvd", "--socket", "s", "--base-timeout", "nan")],
)  # fmt: skip
def test_what_is_no_number_of_seconds_is_refused_as_one(words, capsys):
    assert main(words) == 1
    said = capsys.readouterr().err
    assert words[-2] in said
    assert "internal" not in said
