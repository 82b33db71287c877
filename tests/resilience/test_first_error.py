"""The root cause is told apart from what merely noticed it."""

import os
import signal
from pathlib import Path

from stretto.resilience import FirstErrors, Lookout, RankFailure, StopRequest, describe
from stretto.spec.errors import CheckpointError
from stretto.spec.run import RunSettings
from stretto.trainer.post_mortem import Death, explain


def failure(rank: int, error: BaseException) -> RankFailure:
    try:
        raise error
    except BaseException as caught:
        return RankFailure.of(rank, caught)


def test_who_noticed_comes_last_however_early_it_wrote(tmp_path: Path) -> None:
    errors = FirstErrors(tmp_path, "one")
    assert errors.write(failure(0, RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242")))
    assert errors.write(failure(2, ZeroDivisionError("division by zero")))
    assert errors.write(RankFailure.watched(1, "rank 2 has been silent"))
    found = errors.read()
    assert [f.rank for f in found] == [2, 1, 0]
    assert describe(found[0]).startswith("rank 2 (host ")
    assert "ZeroDivisionError: division by zero" in describe(found[0]) and "raise error" in describe(found[0])
    errors.clear()
    assert errors.read() == []


def test_a_users_error_is_its_sentence_and_class() -> None:
    told = failure(1, CheckpointError("shard 3 timed out"))
    assert not told.noticed and told.users is CheckpointError and describe(told) == "shard 3 timed out"


def test_an_unwritable_folder_is_told_not_raised(tmp_path: Path) -> None:
    (tmp_path / "errors").write_text("a file where the folder should be")
    errors = FirstErrors(tmp_path, "one")
    assert not errors.write(failure(0, ValueError("x")))
    assert errors.claim("said anyway")


def test_one_process_of_a_machine_claims_a_text(tmp_path: Path) -> None:
    errors = FirstErrors(tmp_path, "one")
    assert [errors.claim("a"), errors.claim("a"), errors.claim("b")] == [True, False, True]


def test_a_signal_comes_before_what_noticed_it(tmp_path: Path) -> None:
    noticed = failure(0, RuntimeError("Connection reset by peer"))
    deaths = [Death(rank=0, pid=10, code=1), Death(rank=1, pid=11, code=-int(signal.SIGSEGV))]
    lookout = Lookout(RunSettings(dir=str(tmp_path)), {0: 10, 1: 11})
    assert explain(deaths, [noticed], lookout).text == "rank 1 was killed by SIGSEGV"
    silent = explain([Death(rank=4, pid=14, code=3)], [], lookout)
    assert silent.text == "rank 4 (pid 14) ended with exit code 3 without a message"
    taken = explain(deaths[:1], [failure(0, RuntimeError("port 5: address already in use"))], lookout)
    assert taken.port_taken


def test_a_stop_request_hears_signals_only_while_it_listens() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.listening():
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before
