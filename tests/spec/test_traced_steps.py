"""``run.trace`` says which steps are recorded."""

from __future__ import annotations

import pytest

from stretto.spec.errors import ConfigError
from stretto.spec.traced_steps import traced_steps


def test_what_it_may_be() -> None:
    assert traced_steps("off") == () and traced_steps("last") is None
    assert traced_steps("20") == ((20, 20),)
    assert traced_steps("5, 10-12,7") == ((5, 5), (10, 12), (7, 7))


@pytest.mark.parametrize("text", ["", "on", "0", "5-", "7-5", "-3", "1,,2", "1.5"])
def test_what_it_may_not_be(text: str) -> None:
    with pytest.raises(ConfigError, match='says no steps; write "off", "last"'):
        traced_steps(text)
