"""Where the ranks of one host meet. torch's store listens on all interfaces, and whoever reaches it can hand a rank a
pickle; ranks that meet on the loopback get a store that only this host reaches."""

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME, _LOOPBACK = "loopback", "127.0.0.1"
#: What MASTER_ADDR is where all ranks are on one host.
_THIS_HOST = (_LOOPBACK, "localhost")
_BACKLOG = 2048


def init_method() -> str | None:
    """For torch's `init_process_group`. None, torch's own way, where ranks of other hosts must reach the store,
    or where torchrun has one."""
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{_SCHEME}://" if os.environ.get("MASTER_ADDR") in _THIS_HOST and not has_store else None


def _meet(_url: str, timeout: timedelta = timedelta(minutes=5), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's `env://`, but for the address that rank 0 listens on."""
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
    """A listening socket, which the store takes over; None where it cannot be had. torch then says why, or finds that
    this process has a store there already."""
    with socket.socket() as made:
        # As torch does: a port that was in use a moment ago may still be waiting for late packets.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((_LOOPBACK, port))
            made.listen(_BACKLOG)
        except OSError:
            return None
        return made.detach()


register_rendezvous_handler(_SCHEME, _meet)
