# SPDX-License-Identifier: Apache-2.0
"""Every error has a code of its own, one sentence, and a hint."""

import errno
import string

import pytest

from fvdengine import errors


def every_error():
    found = [errors.EngineError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return [cls for cls in found[1:] if cls.__module__ == errors.__name__]


def names_in(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def make(cls):
    names = names_in(cls.template) | names_in(cls.hint_template)
    return cls(**{name: f"<{name}>" for name in names})


def test_codes_are_unique_and_snake_case():
    codes = [cls.code for cls in every_error()]
    assert len(codes) == len(set(codes))
    assert all(code.replace("_", "").isalpha() and code == code.lower() for code in codes)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.code)
def test_error_is_one_sentence_with_a_remedy(cls):
    error = make(cls)
    assert str(error) == error.message
    assert "\n" not in error.message
    assert not error.message.endswith(".")
    assert error.hint
    assert error.exit_status == 1


def test_a_name_in_a_command_is_one_word_of_it():
    error = errors.InvalidHeader(path="/srv/a b.fvd", field="block_size", reason="is 1")
    assert "`fvdctl check '/srv/a b.fvd'`" in error.hint
    assert set(error.details) == {"path", "field", "reason"}


def test_hint_can_be_given():
    assert errors.ImageNotFound(path="x", hint="Look again.").hint == "Look again."


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, errors.ImageNotFound),
        (errno.EACCES, errors.NoPermission),
        (errno.EPERM, errors.NoPermission),
        (errno.EROFS, errors.ReadOnlyStore),
        (errno.ENOSPC, errors.NoSpace),
        (errno.EDQUOT, errors.NoSpace),
        (errno.EFBIG, errors.FileTooLarge),
        (errno.EISDIR, errors.NotAFile),
        (errno.EIO, errors.IoFailed),
    ],
)
def test_errno_becomes_the_error_that_says_it(number, expected):
    error = errors.from_os_error(OSError(number, "text"), "some/file", "read")
    assert type(error) is expected
    assert "some/file" in error.message
