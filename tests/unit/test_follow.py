"""How the driver follows a run to its end, and which rank it names as the cause from the reports of the hosts."""

import signal

import pytest

from stack.health.cause import WAITED
from stack.launch.follow import follow
from stack.launch.signals import Requests
from stack.launch.verdict import Ended, Failure, Report, first_failure
from stack.train import stop_request
from stack.train.progress import Look
from stack.train.rundir import RunDir

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
    assert failure.message == "the launcher ended with exit code -9 before the run was done"
    assert (failure.rank, sure) == (None, False)


def test_ranks_that_somebody_else_stopped_are_no_success():
    failure, _ = first_failure([report(Ended(1, pid=101, outcome="stopped"), launcher=None)])
    assert failure.message == "rank 1 was stopped by SIGTERM from outside"


def test_only_all_ranks_done_is_a_success():
    done = [Ended(rank, pid=100 + rank, outcome="done") for rank in (0, 1)]
    assert first_failure([report(*done, launcher=0)]) == (None, False)
    assert first_failure([report(*done[:1], launcher=0)])[0] is not None


class FakeAgent:
    """An agent with the interface that `follow` uses."""

    def __init__(self, report: Report | None = None, looks: list[Look] | None = None):
        self.report, self.looks, self.ended, self.asked, self._answer = report, None, False, [], looks
        self.host = "host-b"

    def silent(self, passed_s: float) -> Failure | None:
        assert passed_s >= 0
        return None

    def save(self) -> None:
        self.asked.append("save")
        saved = {"rank": 0, "type": "Requeue", "message": "saved on request", "exit_code": 75, "time": 1.0}
        self.report = report(Ended(0, 100, "error", saved), started=1)

    def look(self) -> None:
        self.looks = self._answer


class Screen(list):
    def note(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "ranks/0").mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    return RunDir(tmp_path)


def followed(run: RunDir, *agents: FakeAgent, signals: tuple[signal.Signals, ...] = (), screen: Screen | None = None):
    requests = Requests(list(signals), run)
    return follow(agents, run, Screen() if screen is None else screen, requests, grace_s=1, saves=True)


@pytest.mark.parametrize("by", ["Ctrl-C", "SIGTERM", "stack stop"])
def test_the_first_request_saves(run, by):
    (run.rank(0) / "rank.json").touch()
    signals = {"Ctrl-C": (signal.SIGINT,), "SIGTERM": (signal.SIGTERM,)}.get(by, ())
    if not signals:
        stop_request.ask(run, now=False)
    agent, screen = FakeAgent(), Screen()
    assert followed(run, agent, signals=signals, screen=screen).exit_code == 75
    assert agent.asked == ["save"]
    assert screen[0].startswith(f"{by}: the run is saved after this step, and ends; ")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGINT), 130),
        ((signal.SIGHUP,), 129),
    ],
)
def test_the_second_request_and_a_closed_terminal_end_at_once(run, signals, code):
    (run.rank(0) / "rank.json").touch()
    assert followed(run, FakeAgent(), signals=signals).exit_code == code


def test_stack_stop_now_ends_at_once(run):
    (run.rank(0) / "rank.json").touch()
    stop_request.ask(run, now=True)
    found = followed(run, FakeAgent())
    assert (found.message, found.exit_code) == ("stopped by stack stop", 143)


def test_who_asks_for_a_save_that_is_under_way_does_not_break_it(run):
    (run.rank(0) / "rank.json").touch()
    stop_request.ask(run, now=False)
    assert followed(run, FakeAgent(), signals=(signal.SIGINT,)).exit_code == 75


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_a_rank_is_up_the_first_request_ends_at_once(run, number, code):
    agent = FakeAgent()
    assert followed(run, agent, signals=(number,)).exit_code == code
    assert agent.asked == []


def test_an_agent_that_is_silent_ends_the_run(run):
    agent = FakeAgent()
    agent.silent = lambda _: Failure("HostError", "no word", 9, host="host-b")
    assert followed(run, FakeAgent(), agent).message == "no word"


def test_a_hang_is_asked_about_on_the_hosts_that_have_said_nothing(run):
    gave_up = f"{WAITED} health.hang_timeout_s: gloo/"
    hung = Ended(1, 101, "error", {"rank": 1, "type": "HangError", "message": gave_up, "exit_code": 8, "time": 1.0})
    stopped = Look(3, "host-b", 103, True, 12, "training")
    found = followed(run, FakeAgent(report(hung)), FakeAgent(looks=[stopped]))
    assert (found.type, found.rank, found.host) == ("HangError", 3, "host-b")
    assert found.message.startswith("process 103 on host-b is stopped")
