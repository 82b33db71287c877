"""The schedule file: what is written can be read, and what can't be read is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Op, Schedule
from stretto.schedule.document import from_json, load, save, to_json
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.split_backward import split_backward
from stretto.spec.errors import ScheduleError


@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "forward-only"]),
    ranks=st.integers(1, 5),
    microbatches=st.integers(1, 9),
    change=st.sampled_from([lambda s: s, lower, split_backward]),
)
@settings(max_examples=50, deadline=None)
def test_round_trip(name: str, ranks: int, microbatches: int, change: object) -> None:
    schedule = change(build(name, ranks=ranks, microbatches=microbatches))
    assert from_json(to_json(schedule)) == schedule


def test_round_trip_of_paths_frozen_stages_and_replicas(tmp_path: Path) -> None:
    schedule = Schedule.from_orders(
        [[Op.parse("0F0"), Op.parse("0F1")], [Op.parse("1F0"), Op.parse("1B0")]],
        name="all of it",
        num_stages=2,
        num_microbatches=2,
        placement=[[0, 1], [1, 0]],
        voice=[0, 1],
        paths=[[0, 1], [0]],
        frozen=[0],
    )
    save(schedule, tmp_path / "s.json")
    assert load(tmp_path / "s.json") == schedule


def test_a_pair_is_one_token_where_messages_are_written_and_flat_elsewhere() -> None:
    orders = [
        [Op.parse(token) for token in order] for order in (["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"])
    ]
    orders[0][1] = replace(orders[0][1], joined=True)
    schedule = Schedule.from_orders(orders, name="pair", num_stages=2, num_microbatches=2, placement=[[0, 1]])
    assert json.loads(to_json(schedule))["actions"][0] == ["0F0", "0F1", "0B0", "0B1"]
    assert from_json(to_json(schedule)).joined is None
    lowered = lower(schedule)
    actions = json.loads(to_json(lowered))["actions"]
    assert actions[0] == ["0F0", "0SEND_F0", "0RECV_B0", "0F1+0B0", "0SEND_F1", "0RECV_B1", "0B1"]
    assert from_json(to_json(lowered)) == lowered


def test_ranks_may_have_nothing_to_do() -> None:
    idle = Schedule.from_orders([[], []], name="idle", num_stages=1, num_microbatches=1, placement=[[0]])
    assert from_json(to_json(idle)) == idle


def test_the_keys_of_the_format() -> None:
    document = json.loads(to_json(build("1f1b", ranks=2, microbatches=2)))
    assert document == {
        "format": "stretto.schedule/1",
        "name": "1f1b",
        "ranks": 2,
        "stages": 2,
        "microbatches": 2,
        "placement": [[0, 1]],
        "voice": [0, 0],
        "actions": [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]],
    }
    assert json.loads(to_json(build("forward-only", ranks=2, microbatches=2)))["forward_only"] is True


MISSING = object()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "format",
            "stretto.schedule/9",
            "has the format 'stretto.schedule/9'; this version reads 'stretto.schedule/1'",
        ),
        ("format", MISSING, "has the format None"),
        ("voice", MISSING, "has no 'voice'"),
        ("action", [], "unknown key 'action'; did you mean 'actions'?"),
        ("name", 3, "has the name 3; a name is a string"),
        ("ranks", "2", "ranks='2'; it is an integer from 1 to 999999999"),
        ("ranks", 0, "ranks=0; it is an integer from 1 to 999999999"),
        ("ranks", True, "ranks=True; it is an integer"),
        ("ranks", 3, "ranks=3, but actions of 2 ranks"),
        ("stages", 3, "placement[0] places 2 stages, but there are 3"),
        ("microbatches", 1, "voice has 2 entries"),
        ("placement", [0, 1], "placement[0]=0; it is a list of integers"),
        ("placement", [[0, "1"]], "placement[0][1]='1'; it is a list of integers"),
        ("placement", 3, "placement=3; it is a list of lists"),
        ("placement", [[0, 5]], "puts stage 1 on rank 5"),
        ("voice", [0, 1.0], "voice[1]=1.0"),
        ("frozen", 1, "frozen=1; it is a list of integers"),
        ("frozen", [2], "frozen names stages [2]"),
        ("paths", [[0], [0, 7]], "paths[1] is [0, 7]"),
        ("forward_only", 1, "forward_only=1; it is true or false"),
        ("actions", [["0F0"], [3]], "actions[1][0]=3; it is a list of strings"),
        ("actions", [["0F0"], ["1F0", "1X0"]], "Rank 1, operation 1: '1X0' has the unknown kind 'X'"),
        ("actions", [["0F0"], ["forward"]], "Rank 1, operation 0: 'forward' is not an operation"),
        ("actions", [["0F0"], ["1F9"]], "Rank 1, operation 0: 1F9 has a micro-batch that isn't there"),
        ("actions", [["9F0"], ["1F0"]], "Rank 0, operation 0: 9F0 has a stage that isn't there"),
        ("actions", [["9SEND_F0"], ["1F0"]], "Rank 0, operation 0: 9SEND_F0 has a stage that isn't there"),
        ("actions", [["0F9999999999"], ["1F0"]], "'0F9999999999' is not an operation"),
        ("actions", [["0F0"], ["1F0+"]], "Rank 1, operation 0: '' is not an operation"),
        ("actions", [["0F0"], ["1F0", "1F0+1B0+1B1"]], "Rank 1, operation 1: '1F0+1B0+1B1' joins 3 operations"),
        ("actions", [["0F0"], ["x" * 5000]], "Rank 1, operation 0: 'xxx"),
        ("stages", 10**30, "stages=1000000000000000000000000000000; it is an integer from 1 to 999999999"),
        ("stages", 10**4000, "stages=1000"),
        ("stages", 10**8, "placement[0] places 2 stages, but there are 100000000"),
        ("microbatches", 10**8, "voice has 2 entries, but there are 100000000"),
        ("placement", [[0, 10**30]], "placement[0][1]=1000000000000000000000000000000; the most is 999999999"),
        ("voice", [0, -(10**30)], "voice[1]=-1000"),
        ("name", ["x" * 5000], "has the name ['xxx"),
        ("ranks", float("nan"), "ranks=nan; it is an integer"),
    ],
)
def test_malformed_files_are_one_clear_error(key: str, value: object, said: str) -> None:
    document = json.loads(to_json(build("1f1b", ranks=2, microbatches=2)))
    if value is MISSING:
        del document[key]
    else:
        document[key] = value
    with pytest.raises(ScheduleError) as error:
        from_json(json.dumps(document))
    assert said in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"ranks": 1, "ranks": 2}', "is not JSON: the key 'ranks' occurs twice"),
        ('{"ranks": ' + "9" * 5000 + "}", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_document(content: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        from_json(content)


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"none\.json can't be read"):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ScheduleError, match=r"bad\.json: The schedule file has the format None"):
        load(tmp_path / "bad.json")
