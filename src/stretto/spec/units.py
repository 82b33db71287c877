"""Sizes, times and counts as people write them: ``80 GB``, ``1.5 ms``, ``8.03 B``.

Bytes are decimal when written with ``kB MB GB TB`` and binary with ``KiB MiB GiB TiB``; what is
formatted is decimal, as data sheets are.
"""

from __future__ import annotations

import re

from stretto.spec.errors import ConfigError

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
BINARY_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> float:
    """Bytes of ``80 GB`` or ``512 MiB``; a bare number is bytes.

    >>> parse_bytes("80 GB"), parse_bytes("1.5KiB")
    (80000000000.0, 1536.0)
    """
    return _parse(text, {**BYTES, **BINARY_BYTES, "": 1}, "bytes")


def parse_seconds(text: str) -> float:
    """Seconds of ``10 ms`` or ``2 min``; a bare number is seconds.

    >>> parse_seconds("10 ms"), parse_seconds("2min")
    (0.01, 120.0)
    """
    return _parse(text, {**SECONDS, "": 1.0}, "a time")


def parse_count(text: str) -> float:
    """Number meant by ``1.5M`` or ``8 B`` (10^9).

    >>> parse_count("1.5M"), parse_count("300")
    (1500000.0, 300.0)
    """
    return _parse(text, COUNTS, "a count")


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with three digits and a decimal unit.

    >>> format_bytes(0), format_bytes(16_060_522_496), format_bytes(999_999)
    ('0 B', '16.1 GB', '1.00 MB')
    """
    return _format(num_bytes, BYTES, " ")


def format_seconds(seconds: float) -> str:
    """``seconds`` with three digits and the unit that suits, minutes and hours in full.

    >>> format_seconds(0.00154), format_seconds(12.3), format_seconds(4000)
    ('1.54 ms', '12.3 s', '1 h 07 min')
    """
    if seconds >= 3570:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"
    if seconds >= 59.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    return _format(seconds, {name: SECONDS[name] for name in ("ns", "us", "ms", "s")}, " ")


def format_count(count: float) -> str:
    """``count`` with three digits and k, M, B (10^9) or T.

    >>> format_count(8_030_261_248), format_count(128), format_count(1_500)
    ('8.03 B', '128', '1.50 k')
    """
    return _format(count, COUNTS, " ").rstrip()


def _parse(text: str, units: dict[str, int] | dict[str, float] | dict[str, int | float], what: str) -> float:
    found = _QUANTITY.fullmatch(text)
    if found is None or found[2] not in units:
        choices = ", ".join(name for name in units if name)
        raise ConfigError(f"{text!r} is not {what}; write a number and one of {choices}.")
    return float(found[1]) * units[found[2]]


def _format(value: float, units: dict[str, int] | dict[str, float], gap: str) -> str:
    if value == 0:
        return f"0{gap}{next(iter(units))}"
    names = list(units)
    index = max((i for i, name in enumerate(names) if abs(value) >= units[name]), default=0)
    # 999,999 rounds to 1000 of its own unit, so it is shown as 1.00 of the next.
    if abs(value) / units[names[index]] >= 999.5 and index + 1 < len(names):
        index += 1
    scaled = value / units[names[index]]
    whole = units[names[index]] == 1 and float(value).is_integer()
    digits = 0 if whole or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f}{gap}{names[index]}"
