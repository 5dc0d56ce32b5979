"""Checks that ranks run right after the process group is made: all ranks are present, have the same versions and device
type, can send to the next rank, and get the right sum from an all-reduce. Each check has a timeout."""

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
#: Number of ring exchanges and of all-reduces. The measured latency and bandwidth are means over them.
_LAPS, _SUMS = 20, 3
#: Numbers in a message of the ring, and fp32 numbers in a timed all-reduce, by the type of device.
_RING, _SUMMED = 256, {"cpu": 1 << 20, "cuda": 1 << 24}
#: Advice for a link that does not work.
_HINT = "check GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME (the network interface between the hosts) and firewalls"
_CALLS = itertools.count()


@dataclass(frozen=True)
class Links:
    """Latency and bandwidth of the slowest rank."""

    ranks: int
    hosts: int
    backend: str
    ring_s: float
    """Time of one exchange in s. Every rank sends 2 kB to the next rank and receives 2 kB from the one before."""
    bytes_per_s: float
    """Bytes that each rank sends in an all-reduce of n ranks, 2 (n - 1) / n of its size, divided by its time."""

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks on {self.hosts} {'host' if self.hosts == 1 else 'hosts'} ({self.backend}): ring "
            f"{self.ring_s * 1e6:,.0f} us an exchange, all-reduce {self.bytes_per_s / 1e9:.2f} GB/s"
        )


class _Outcome(NamedTuple):
    """Outcome of one rank in one check."""

    late: bool
    error: str
    """Message of the library; empty if there was no error."""
    result: Any


def check_ranks(device: torch.device, *, timeout_s: float = 60.0) -> Links:
    """Prints and returns the measured links, or raises the same error on every rank that is present. Collective over
    the world that `init_distributed` made, of two ranks or more.

    Args:
        device: device of this rank; with a GPU the default group uses NCCL.
        timeout_s: bound of each of the five waits: for all ranks, their connections, their versions and devices, the
            ring, and the sum.

    Raises:
        HangError: ranks are missing or did not finish in time; the message names them.
        HostError: a rank differs from the others, or received other data than was sent.
    """
    _wait_for_all(timeout_s)
    # Outcomes travel over gloo with a longer timeout than the tested group has, so that the failure of that group can
    # be reported. NCCL's watchdog would abort a process whose collective hangs.
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
    """Uses only the store through which the ranks have met, because a collective cannot say which rank is missing. The
    store ends with rank 0, so a rank that asks late may only learn that rank 0 has ended."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"stack/check/{next(_CALLS)}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.set(keys[dist.get_rank()], socket.gethostname())
        store.wait(keys, timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise HangError(f"{_ranks(missing)} did not join the check of ranks within {timeout_s:g} s") from error


def _connected(make: Callable[[], dist.ProcessGroup]) -> dist.ProcessGroup:
    try:
        return make()
    except RuntimeError as error:
        rank, host = dist.get_rank(), socket.gethostname()
        raise HostError(f"rank {rank} on {host} cannot connect to the others: {_line(error)}; {_HINT}") from error


def _outcomes(own: _Outcome, group: dist.ProcessGroup) -> list[_Outcome]:
    """The outcomes of all ranks, by rank."""
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
    for what, remedy in (("device", "use the same type on all ranks"), ("versions", "install the same version there")):
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
    """Runs `work` on a thread of its own, so that a hang in it, as in the setup of NCCL, does not block this thread."""
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
                f"{what} gave rank {rank} on {hosts[rank]} the sum {outcome.result[0]:g} instead of "
                f"{expected[rank]:g}; the memory or network of that host corrupts data"
            )


def _check_links(waiting: Sequence[int], hosts: Sequence[str], where: str) -> None:
    """Names the rank that is cut off, or the links of the ring that carry nothing.

    Args:
        waiting: ranks that have received nothing; with NCCL also ranks that could not send (one handle for both).
    """
    links = [(_before(rank), rank) for rank in waiting]
    if not links:
        return
    shared = set(links[0]).intersection(*links)
    if len(links) > 1 and len(shared) == 1:
        raise HangError(f"{_ranks([*shared], hosts)} is cut off: a ring of sends {where} did not get through; {_HINT}")
    first, second = links[0]
    more = f" and {len(links) - 1} more" if len(links) > 1 else ""
    raise HangError(
        f"no data came from {_ranks([first], hosts)} to {_ranks([second], hosts)}{more} in a ring of sends {where}; "
        f"{_HINT}"
    )


def _before(rank: int) -> int:
    return (rank - 1) % dist.get_world_size()


def _message(rank: int) -> list[int]:
    """The message of a rank: numbers that fp32 holds exactly, and that no other rank sends."""
    return [rank * _RING + number for number in range(_RING)]


def _ring(group: dist.ProcessGroup, device: torch.device, arrived: list[bool]) -> tuple[float, float]:
    """Sum of the numbers received from the rank before, and the mean time of an exchange in s.

    Args:
        arrived: gets an entry for each message that was received.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sent = torch.tensor(_message(rank), dtype=torch.float64, device=device)
    received = torch.zeros_like(sent)

    def exchange() -> float:
        # In one batch: on NCCL a ring in which all ranks send first would deadlock.
        operations = [
            dist.P2POp(dist.isend, sent, (rank + 1) % world, group),
            dist.P2POp(dist.irecv, received, _before(rank), group),
        ]
        # gloo returns one handle for each operation, the receive last; NCCL returns one handle for both.
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
    """Sum of the numbers of all ranks, counted from 1, and the bytes per second of a large all-reduce."""
    world = dist.get_world_size()
    total = torch.tensor(dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total, group=group)
    large = torch.zeros(_SUMMED[device.type], device=device)
    # Untimed: the first all-reduce of this size connects and allocates.
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
