"""How the cores of a host are divided among its ranks."""

import os

import pytest

from stack.train import cores


@pytest.mark.parametrize(("count", "ranks"), [(2, 2), (8, 2), (10, 3), (96, 8)])
def test_each_core_has_one_rank_and_shares_are_even(count, ranks):
    shares = [cores.own_cores(list(range(count)), rank, ranks) for rank in range(ranks)]
    assert [core for share in shares for core in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_cores_are_left_to_the_scheduler():
    assert all(cores.own_cores([0, 1], rank, 4) == [0, 1] for rank in range(4))


@pytest.fixture
def bound(monkeypatch):
    """A list of the core sets to which ranks bind themselves on a simulated host of four cores."""
    taken = []
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 4, 5, 6})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, share: taken.append(share))
    return taken


@pytest.mark.parametrize("size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_a_rank_is_kept_on_its_share_of_what_it_may_use(bound, size, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(size, "2")
    cores.bind()
    assert bound == [[6, 7]]


def test_without_a_launcher_that_counts_the_ranks_nothing_is_bound(bound, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    cores.bind()
    assert bound == []
