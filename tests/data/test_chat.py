"""How chat records are written as text."""

from __future__ import annotations

import pytest

from stretto.data.chat import Segment, render
from stretto.spec.errors import DataError


def test_only_answers_and_their_ends_count() -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}]
    assert render(turns, ("assistant",), "a:1") == [
        Segment("<|system|>\n", counts=False, ends=False),
        Segment("S", counts=False, ends=True),
        Segment("<|assistant|>\n", counts=False, ends=False),
        Segment("A", counts=True, ends=True),
    ]
    assert [s.counts for s in render(turns, ("assistant", "system"), "a:1")] == [False, True, False, True]


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render([{"role": "user", "content": parts}], (), "a:1")[1].text == "one two"


def test_content_that_is_no_text() -> None:
    with pytest.raises(DataError, match="a:1: the content of a chat turn is list, not text"):
        render([{"role": "user", "content": [{"type": "image"}]}], (), "a:1")
