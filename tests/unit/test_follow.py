"""Which rank is named, from what the hosts report."""

import pytest

from stack.launch.verdict import Ended, Report, first_failure

LOST = "Connection closed by peer [192.0.2.2]:4711"


def error(rank: int, message: str, time: float) -> Ended:
    told = {"rank": rank, "type": "ValueError", "message": message, "exit_code": 9, "time": time}
    return Ended(rank, pid=100 + rank, outcome="error", error=told)


def report(*ranks: Ended, host: str = "host-a", started: int = 2, launcher: int | None = 1) -> Report:
    return Report(host, started, list(ranks), launcher)


def killed(rank: int, *, hung: bool = False) -> Ended:
    return Ended(rank, pid=100 + rank, outcome=None, hung=hung)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_its_launcher_stopped_is_not_the_one_that_failed(rank):
    stopped = Ended(1 - rank, pid=100 + 1 - rank, outcome="stopped")

    failure, sure = first_failure([report(killed(rank), stopped)])

    assert (failure.type, failure.rank, failure.exit_code, sure) == ("RankFailure", rank, 9, True)
    assert f"process {100 + rank} was killed" in failure.message


def test_the_first_error_that_is_not_a_lost_peer_counts_wherever_it_was():
    first = report(error(0, LOST, 1.0), error(1, "late", 3.0), host="host-a")
    second = report(error(2, "early", 2.0), host="host-b")

    failure, sure = first_failure([first, second])

    assert (failure.rank, failure.host, failure.message, sure) == (2, "host-b", "early", True)


def test_a_killed_rank_of_another_host_counts_more_than_those_that_miss_it():
    lost = report(error(0, LOST, 1.0), started=1)
    assert first_failure([lost]) == (first_failure([lost])[0], False)

    failure, sure = first_failure([lost, report(killed(1), host="host-b", started=1)])

    assert (failure.rank, failure.host, sure) == (1, "host-b", True)


def test_a_rank_that_the_watchdog_ended_is_a_hang():
    failure, _ = first_failure([report(killed(0), killed(1, hung=True))])
    assert (failure.type, failure.exit_code, failure.rank) == ("HangError", 8, 1)


def test_a_launcher_that_ends_alone_is_named_for_want_of_better():
    failure, sure = first_failure([report(Ended(0, pid=None, outcome=None), launcher=-9)])
    assert (failure.message, failure.rank, sure) == ("the launcher ended with -9 before the run was done", None, False)


def test_ranks_that_somebody_else_stopped_are_no_success():
    failure, _ = first_failure([report(Ended(1, pid=101, outcome="stopped"), launcher=None)])
    assert failure.message == "rank 1 was stopped by SIGTERM from outside"


def test_only_all_ranks_done_is_a_success():
    done = [Ended(rank, pid=100 + rank, outcome="done") for rank in (0, 1)]
    assert first_failure([report(*done, launcher=0)]) == (None, False)
    assert first_failure([report(*done[:1], launcher=0)])[0] is not None
