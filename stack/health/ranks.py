"""What the ranks of several hosts check among themselves, right after they have found each other: that all are there
and alike, that what one sends arrives at the next, and that a sum over all is right. Each within a bound."""

import itertools
import platform
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from stack import __version__
from stack.errors import HangError, HostError
from stack.health.odd import odd_ones
from stack.parallel import messages

_PACKAGES = ("torch", "deepspeed", "transformers")
#: Exchanges over the ring that its latency is the mean of, and all-reduces that the bandwidth is.
_LAPS, _SUMS = 20, 3
#: Numbers of a message in the ring, and fp32 numbers of an all-reduce that is timed, by the type of device.
_RING, _SUMMED = 256, {"cpu": 1 << 20, "cuda": 1 << 24}
#: Told of a link that does not work.
_HINT = "see that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between the hosts, and its firewall"
_CALLS = itertools.count()


@dataclass(frozen=True)
class Links:
    """What the slowest rank found."""

    ranks: int
    hosts: int
    backend: str
    ring_s: float
    """Time of one exchange in which every rank sends 2 kB to the next and receives from the one before, in s."""
    bytes_per_s: float
    """What each rank sends in an all-reduce, 2 (n - 1) / n of its size, over the time that it takes."""

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks on {self.hosts} {'host' if self.hosts == 1 else 'hosts'} ({self.backend}): ring "
            f"{self.ring_s * 1e6:,.0f} us an exchange, all-reduce {self.bytes_per_s / 1e9:.2f} GB/s"
        )


class _Outcome(NamedTuple):
    """How a rank's part of a check ended."""

    late: bool
    error: str
    """Of the library; empty where there was none."""
    result: Any


def check_ranks(device: torch.device, *, timeout_s: float = 60.0) -> Links:
    """Prints and returns what it measured, or raises the same error on every rank that is there. Collective over the
    world, of two ranks or more, which `init_distributed` made.

    Args:
        device: this rank's; with a GPU the default group is NCCL's.
        timeout_s: bound of each of the five waits: for all ranks, for their connections, for what they are, for the
            ring, for the sum.

    Raises:
        HangError: ranks are missing, or did not end in time; they are named.
        HostError: a rank is unlike the others, or got other content than was sent to it.
    """
    _wait_for_all(timeout_s)
    # What tells about a failure outlives what fails. On NCCL a group beside it: its watchdog ends all that it hangs in.
    telling = _connected(lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=3 * timeout_s)))
    facts = messages.gather(_facts(device), telling)
    hosts = [fact["host"] for fact in facts]
    _compare(facts, hosts)
    tested = _connected(lambda: dist.new_group(timeout=timedelta(seconds=2 * timeout_s)))
    where = f"over {dist.get_backend(tested)} within {timeout_s:g} s"
    arrived: list[bool] = []
    ring = _outcomes(_bounded(lambda: _ring(tested, device, arrived), device, timeout_s), telling)
    came = messages.gather(bool(arrived), telling)
    _check_links([rank for rank in range(len(facts)) if not came[rank]], hosts, where)
    _check(ring, [sum(_message(_before(rank))) for rank in range(len(facts))], hosts, f"a ring of sends {where}")
    summed = _outcomes(_bounded(lambda: _sum(tested, device), device, timeout_s), telling)
    total = len(facts) * (len(facts) + 1) / 2
    _check(summed, [total] * len(facts), hosts, f"an all-reduce {where}")
    for group in (tested, telling):
        dist.destroy_process_group(group)
    links = Links(
        ranks=len(facts),
        hosts=len(set(hosts)),
        backend=str(dist.get_backend()),
        ring_s=max(outcome.result[1] for outcome in ring),
        bytes_per_s=min(outcome.result[1] for outcome in summed),
    )
    print(links, flush=True)
    return links


def _wait_for_all(timeout_s: float) -> None:
    """By the store alone, through which the ranks have met: a collective with a missing rank could not tell which. The
    store goes with rank 0, so that those who ask it last may only learn that rank 0 has ended."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"stack/check/{next(_CALLS)}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.set(keys[dist.get_rank()], socket.gethostname())
        store.wait(keys, timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise HangError(f"{_ranks(missing)} did not come to the check of ranks within {timeout_s:g} s") from error


def _connected(make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
    try:
        return make()
    except RuntimeError as error:
        rank, host = dist.get_rank(), socket.gethostname()
        raise HostError(f"rank {rank} on {host} does not reach the others: {_line(error)}; {_HINT}") from error


def _outcomes(own: _Outcome, group: dist.ProcessGroup) -> list[_Outcome]:
    """Those of all ranks, by rank."""
    return [_Outcome(*outcome) for outcome in messages.gather(own, group)]


def _facts(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    about = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "host": socket.gethostname(),
        "device": device.type,
        "uuid": str(about.uuid) if about else None,
        "versions": {
            "stack": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
            "CUDA": torch.version.cuda,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        },
        "GPU": f"{about.name}, {about.total_memory / (1 << 30):.0f} GiB" if about else None,
    }


def _compare(facts: Sequence[dict[str, Any]], hosts: Sequence[str]) -> None:
    for what, remedy in (("device", "let all ranks use one"), ("versions", "install the same there")):
        of = {rank: fact[what] if what == "versions" else {what: fact[what]} for rank, fact in enumerate(facts)}
        for who, key, has, others in odd_ones(of):
            raise HostError(f"rank {who} on {hosts[who]} has {key} {has}, the others {others}; {remedy}")
    users: dict[Any, int] = {}
    for rank, fact in enumerate(facts):
        if fact["uuid"] is not None and (other := users.setdefault((hosts[rank], fact["uuid"]), rank)) != rank:
            raise HostError(
                f"ranks {other} and {rank} on {hosts[rank]} have the same GPU; use launch.ranks_per_node=auto"
            )
    for who, _, has, others in odd_ones({rank: {"GPU": fact["GPU"]} for rank, fact in enumerate(facts)}):
        print(f"rank {who} on {hosts[who]} has a GPU {has}, the others {others}", flush=True)


def _bounded(work: Callable[[], Any], device: torch.device, timeout_s: float) -> _Outcome:
    """Runs `work` on a thread of its own: what hangs in there, as NCCL does while it connects, leaves this one free."""
    found: list[_Outcome] = []

    def run() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            found.append(_Outcome(late=False, error="", result=work()))
        except RuntimeError as error:
            found.append(_Outcome(late=False, error=_line(error), result=None))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else _Outcome(late=True, error="", result=None)


def _check(outcomes: Sequence[_Outcome], expected: Sequence[float], hosts: Sequence[str], what: str) -> None:
    late = [rank for rank, outcome in enumerate(outcomes) if outcome.late]
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error]
    if late:
        raise HangError(f"{what} did not end on {_ranks(late, hosts)}; {_HINT}")
    if failed:
        raise HostError(f"{what} failed on {_ranks(failed, hosts)}: {outcomes[failed[0]].error}")
    for rank, outcome in enumerate(outcomes):
        if outcome.result[0] != expected[rank]:
            raise HostError(
                f"{what} brought rank {rank} on {hosts[rank]} {outcome.result[0]:g} and should have brought "
                f"{expected[rank]:g}; its memory or network corrupts data"
            )


def _check_links(waiting: Sequence[int], hosts: Sequence[str], where: str) -> None:
    """Names the rank that is cut off, or the links of the ring that carry nothing.

    Args:
        waiting: ranks that nothing has come to. On NCCL also those that could not send, which is one with it.
    """
    links = [(_before(rank), rank) for rank in waiting]
    if not links:
        return
    shared = set(links[0]).intersection(*links)
    if len(links) > 1 and len(shared) == 1:
        raise HangError(f"{_ranks([*shared], hosts)} is cut off: a ring of sends {where} did not pass it; {_HINT}")
    first, second = links[0]
    more = f" and {len(links) - 1} more" if len(links) > 1 else ""
    raise HangError(
        f"nothing came from {_ranks([first], hosts)} to {_ranks([second], hosts)}{more} in a ring of sends {where}; "
        f"{_HINT}"
    )


def _before(rank: int) -> int:
    return (rank - 1) % dist.get_world_size()


def _message(rank: int) -> list[int]:
    """What a rank sends: numbers that fp32 holds exactly, and no other rank's."""
    return [rank * _RING + number for number in range(_RING)]


def _ring(group: dist.ProcessGroup, device: torch.device, arrived: list[bool]) -> tuple[float, float]:
    """Sum of what came from the rank before, and the mean time of an exchange in s.

    Args:
        arrived: becomes longer when something has come.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = torch.tensor(_message(rank), dtype=torch.float64, device=device)
    received = torch.zeros_like(sent)

    def exchange() -> float:
        # In one batch: on NCCL a ring in which all send first would wait for ever.
        operations = [
            dist.P2POp(dist.isend, sent, (rank + 1) % world, group),
            dist.P2POp(dist.irecv, received, _before(rank), group),
        ]
        # On gloo the receive is the last one, on NCCL there is one for both.
        *sends, receive = dist.batch_isend_irecv(operations)
        receive.wait()
        total = received.sum().item()
        arrived.append(True)
        for send in sends:
            send.wait()
        return total

    total = exchange()
    began = time.perf_counter()
    for _ in range(_LAPS):
        exchange()
    return total, (time.perf_counter() - began) / _LAPS


def _sum(group: dist.ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Sum of every rank's number, counted from 1, and the bytes a second of a large all-reduce."""
    world = dist.get_world_size()
    total = torch.tensor(dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total, group=group)
    large = torch.zeros(_SUMMED[device.type], device=device)
    # The first one of this size connects and allocates.
    dist.all_reduce(large, group=group)
    large[0].item()
    began = time.perf_counter()
    for _ in range(_SUMS):
        dist.all_reduce(large, group=group)
    large[0].item()
    seconds = (time.perf_counter() - began) / _SUMS
    return total.item(), 2 * (world - 1) / world * large.nbytes / seconds


def _ranks(ranks: Sequence[int], hosts: Sequence[str] | None = None, most: int = 4) -> str:
    named = [f"rank {rank}" + (f" on {hosts[rank]}" if hosts else "") for rank in ranks[:most]]
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(named) + more


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
