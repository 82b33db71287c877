"""One colour per kind of operation, on light and on dark ground; forward, backward and weights as papers draw them."""

from __future__ import annotations

from stretto.schedule.op import Kind

COLOURS: dict[Kind, tuple[str, str]] = {
    Kind.F: ("#4c7fd1", "#5b8ee0"),
    Kind.B: ("#e58a3a", "#e38b42"),
    Kind.I: ("#efb643", "#e0ac45"),
    Kind.W: ("#4faa7e", "#4ea981"),
    Kind.R: ("#8f77c9", "#9c86d4"),
    Kind.S: ("#d06fae", "#d77cb8"),
    Kind.T: ("#e59ac8", "#b5739c"),
    Kind.O: ("#8a8f98", "#9aa1ab"),
    Kind.L: ("#5f6670", "#c2c8d0"),
    Kind.SEND_F: ("#a9c3ea", "#35537f"),
    Kind.RECV_F: ("#c3d5f1", "#2b4468"),
    Kind.SEND_B: ("#f0c39a", "#7d5027"),
    Kind.RECV_B: ("#f5d7bb", "#664222"),
    Kind.UNSHARD: ("#2aa5b5", "#35b0c0"),
    Kind.RESHARD: ("#9fd5dc", "#27626b"),
    Kind.REDUCE_GRAD: ("#c9554b", "#d2655b"),
    Kind.OPT: ("#3c4450", "#cdd3da"),
}
PALER = 0.5
"""What the last chunk or replica of a rank lacks in strength; the first has 1."""


def declarations(dark: bool) -> str:
    """CSS variables, one per kind: ``--F: #4c7fd1; ...``."""
    return " ".join(f"--{kind.name}: {both[dark]};" for kind, both in COLOURS.items())


def strength(tone: int, tones: int) -> float:
    """How strong the colour of one of several chunks is.

    >>> strength(0, 1), strength(1, 2)
    (1.0, 0.5)
    """
    return 1.0 - PALER * tone / (tones - 1) if tones > 1 else 1.0


def bright(colour: str) -> bool:
    """Whether dark letters are easier to read on it than white ones."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.58 * 255
