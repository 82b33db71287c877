r"""Chat and instruction records as plain text that any tokenizer can read.

A record is a list of turns ``{"role": ..., "content": ...}``; each is written as

    <|user|>\nWhat is a stretto?   end_of_text
    └ header ┘└──── content ─────┘ └─ end ──┘

The header is ordinary text, so it needs no special token and works with bytes too.  Only the content
and the end of turns whose role is in ``data.train_on`` count in the loss: the model learns to answer
and to stop, not to ask.  A ``chat_template`` that stands beside a tokenizer.json is not read: such a
template is a program in a template language, and it doesn't say which of its tokens belong to whom.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stretto.spec.errors import DataError


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is encoded in one go; a document is a sequence of these."""

    text: str
    """What is encoded."""
    counts: bool = True
    """Whether its tokens are predicted in the loss."""
    ends: bool = True
    """Whether end_of_text follows (and counts likewise)."""


def content_text(content: object, where: str) -> str:
    """The text of a turn's content: a string, or a list of parts ``{"type": "text", "text": ...}``."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise DataError(
        f"{where}: the content of a chat turn is {type(content).__name__}, not text; "
        "it may be a string or a list of {type: text, text: ...} parts."
    )


def render(messages: object, train_on: Collection[str], where: str) -> list[Segment]:
    """Segments of one chat record.  ``where`` (file:line) leads the message of a DataError.

    >>> [(s.text, s.counts, s.ends) for s in render([{"role": "user", "content": "Hi"}], ["assistant"], "a:1")]
    [('<|user|>\\n', False, False), ('Hi', False, True)]
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: a chat record is a list of turns {{role, content}}, not {type(messages).__name__}.")
    segments = []
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            found = sorted(turn) if isinstance(turn, Mapping) else type(turn).__name__
            raise DataError(f"{where}: a chat turn needs the fields role and content; it has {found}.")
        segments.append(Segment(f"<|{turn['role']}|>\n", counts=False, ends=False))
        segments.append(Segment(content_text(turn["content"], where), counts=turn["role"] in train_on))
    return segments
