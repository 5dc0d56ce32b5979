"""Makes the store through which the ranks of a run on one host find each other listen on the loopback only.

torch's own store listens on all interfaces. Any process that reaches the store could send a rank a pickle, which can
run code.
"""

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME, _LOOPBACK = "loopback", "127.0.0.1"
#: Values of MASTER_ADDR where all ranks are on one host.
_THIS_HOST = (_LOOPBACK, "localhost")
_BACKLOG = 2048


def init_method() -> str | None:
    """The argument `init_method` for torch's `init_process_group`. None, torch's default, where ranks of other hosts
    must reach the store, or where torchrun already has a store."""
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{_SCHEME}://" if os.environ.get("MASTER_ADDR") in _THIS_HOST and not has_store else None


def _meet(_url: str, timeout: timedelta = timedelta(minutes=5), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """The same as torch's `env://`, except that rank 0 listens on the loopback only."""
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = _listen(port) if rank == 0 else None
    store = TCPStore(
        _LOOPBACK,
        port,
        world,
        is_master=rank == 0,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listening,
    )
    yield store, rank, world


def _listen(port: int) -> int | None:
    """File descriptor of a listening socket, which the store takes over. None where the port is in use; torch then
    raises an error, or reuses the store that this process already has on the port."""
    with socket.socket() as made:
        # As in torch: without this option a port that was in use a moment ago could not be bound (TIME_WAIT).
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((_LOOPBACK, port))
            made.listen(_BACKLOG)
        except OSError:
            return None
        return made.detach()


register_rendezvous_handler(_SCHEME, _meet)
