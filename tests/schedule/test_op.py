"""Operations and their text form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.schedule import Kind, Op
from stretto.spec.errors import ScheduleError


@given(kind=st.sampled_from(sorted(set(Kind) - {Kind.OPT})), stage=st.integers(0, 999), microbatch=st.integers(0, 9999))
def test_text_round_trips(kind: Kind, stage: int, microbatch: int) -> None:
    op = Op(kind, stage=stage, microbatch=microbatch)
    assert Op.parse(str(op)) == op


def test_the_forms_that_files_rely_on() -> None:
    tokens = ["2F0", "3I1", "3W1", "2UNSHARD0", "2RECV_F0", "11REDUCE_GRAD3", "OPT"]
    assert [str(Op.parse(token)) for token in tokens] == tokens
    assert Op.parse("OPT") == Op(Kind.OPT, stage=-1, microbatch=-1, peer=-1)
    assert str(Op(Kind.SEND_F, stage=1, microbatch=2, peer=3)) == "1SEND_F2"


@pytest.mark.parametrize(
    "token", ["", "F0", "2F", "2f0", "02F0", "2F00", "-1F0", "2F0 ", "2 F 0", "2F0+3B1", "1OPT0", "²F0"]
)
def test_anything_else_is_refused(token: str) -> None:
    with pytest.raises(ScheduleError):
        Op.parse(token)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ScheduleError, match="unknown kind 'UNSHAR'; did you mean 'UNSHARD'"):
        Op.parse("2UNSHAR0")


def test_operations_are_immutable_and_hashable() -> None:
    op = Op.parse("2F0")
    with pytest.raises(AttributeError):
        op.stage = 3
    assert len({op, Op.parse("2F0")}) == 1
