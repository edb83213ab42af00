"""The spelling of phrases."""

import pytest

from vessel.data.phrases import normal_phrase


@pytest.mark.parametrize("raw", ["Fibrous_cap", "fibrous  cap.", " FIBROUS cap "])
def test_phrases_have_one_spelling(raw):
    assert normal_phrase(raw) == "fibrous cap"
