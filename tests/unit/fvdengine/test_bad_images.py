# SPDX-License-Identifier: Apache-2.0
"""Every bad image of the table is refused by name, by everybody who looks, and never changed."""

import hashlib

import pytest

from fvdengine.check import check_image
from fvdengine.content import load_content
from fvdengine.errors import EngineError
from fvdengine.info import image_info
from fvdengine.mapping import map_image
from fvdengine.opening import OpenOptions, open_plan
from fvdtest.bad_images import BAD_IMAGES, COMPACT, RAW, RAW_DATA, SEPARATE
from fvdtest.golden import unpack

CASES = list(BAD_IMAGES.values())


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(params=CASES, ids=list(BAD_IMAGES))
def case(request, tmp_path):
    """A case, its image, and that nothing changes."""
    bad = request.param
    path = bad.make(tmp_path)
    before = digests(tmp_path)
    yield bad, path
    assert digests(tmp_path) == before


def assert_named(error, bad):
    assert error.code == bad.code
    assert bad.words in error.message
    assert bad.source in error.message
    assert error.hint
    assert "\n" not in error.message


@pytest.mark.parametrize("read_only", [True, False])
def test_bad_image_cannot_be_opened(case, read_only):
    bad, path = case
    options = OpenOptions(read_only=read_only)
    if bad.stage == "metadata":
        with open_plan(path, options) as plan, pytest.raises(EngineError) as caught:
            load_content(plan.layers)
    else:
        with pytest.raises(EngineError) as caught:
            open_plan(path, options)
    assert_named(caught.value, bad)


def test_bad_image_cannot_be_mapped(case):
    bad, path = case
    with pytest.raises(EngineError) as caught:
        list(map_image(path))
    assert_named(caught.value, bad)


def test_info_refuses_a_bad_header_and_reports_the_rest(case):
    bad, path = case
    if bad.stage == "header":
        with pytest.raises(EngineError) as caught:
            image_info(path)
        assert_named(caught.value, bad)
        return
    found = image_info(path)
    problems = [item.problem for item in (found.data, *found.bases) if item and item.problem]
    if bad.code != "chain_loop":  # which only whoever opens both of them can see
        assert any(bad.words in text for text in (*found.warnings, *problems))


def test_check_finds_a_bad_image(case):
    bad, path = case
    try:
        result = check_image(path)
    except EngineError as error:
        assert_named(error, bad)
        return
    assert result.exit_status in (1, 2)


@pytest.mark.parametrize("name", [COMPACT, SEPARATE, RAW, RAW_DATA])
def test_images_are_good_before_they_are_damaged(tmp_path, name):
    with open_plan(unpack(name, tmp_path).path, OpenOptions()) as plan:
        load_content(plan.layers)
