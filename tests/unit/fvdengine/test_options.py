# SPDX-License-Identifier: Apache-2.0
"""The defaults are those that the format names."""

from dataclasses import FrozenInstanceError

import pytest

from fvdengine.options import CreateOptions, OpenOptions


def test_defaults_write_nothing_unasked():
    options = CreateOptions()
    assert options.copy_on_read is False
    assert options.prefetch_delay_seconds == -1
    assert options.force is False


def test_open_is_strict_by_default():
    options = OpenOptions()
    assert options.allow_dirs == ()
    assert not any([options.accept_changed_base, options.discard_live_state, options.takeover])


def test_options_cannot_be_changed_later():
    with pytest.raises(FrozenInstanceError):
        OpenOptions().read_only = True  # type: ignore[misc]
