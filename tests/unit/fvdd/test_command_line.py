# SPDX-License-Identifier: Apache-2.0
"""What others read as a process's command line, changed by the process itself."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from fvdd.worker.command_line import mark_for_shutdown, replace_word
if sys.argv[1] == "mark":
    mark_for_shutdown()
else:
    print(replace_word(sys.argv[2].encode(), sys.argv[3].encode()))
print(open("/proc/self/cmdline", "rb").read().rstrip(b"\\0").split(b"\\0")[4:])
print(open("/proc/self/cmdline", "rb").read()[:1])
"""


def shown(*words):
    argv = [sys.executable, "-P", "-c", PROGRAM, *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


def test_mark_stands_at_the_beginning():
    assert shown("mark")[-1] == "b'@'"


def test_word_is_replaced_and_the_rest_stays():
    said, words, _ = shown("replace", "/run/_spare", "/run/web")
    assert said == "True"
    assert words == str([b"replace", b"/run/web", b"", b"", b"", b"/run/web"])


@pytest.mark.parametrize(
    ("old", "new"), [("/run/a", "/run/longer"), ("", "/run/web")], ids=["too long", "nothing"]
)
def test_what_does_not_fit_changes_nothing(old, new):
    said, words, _ = shown("replace", old, new)
    assert said == "False"
    assert words == str([b"replace", old.encode(), new.encode()])
