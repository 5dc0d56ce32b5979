"""The store of a run on one host listens on the loopback only."""

import os

import psutil
import pytest

from stack.parallel import meeting
from tests.helpers.pool import free_port


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    return port


def listening(port: int) -> set[str]:
    found = psutil.Process().net_connections("tcp")
    return {about.laddr.ip for about in found if about.status == psutil.CONN_LISTEN and about.laddr.port == port}


def test_it_listens_on_the_loopback(port):
    [(store, rank, world)] = meeting._meet("loopback://")
    assert (rank, world) == (0, 1)
    store.set("key", "value")
    assert listening(port) == {"127.0.0.1"}
    # A second group of the same process uses the existing store.
    [(again, _, _)] = meeting._meet("loopback://")
    assert again.get("key") == b"value"


def test_a_port_that_is_taken_is_told_by_torch(port):
    import socket

    with socket.create_server(("", port)), pytest.raises(RuntimeError, match="address already in use"):
        list(meeting._meet("loopback://"))


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "loopback://"),
        ({"MASTER_ADDR": "localhost"}, "loopback://"),
        ({"MASTER_ADDR": "192.0.2.1"}, None),
        ({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, None),
        ({}, None),
    ],
)
def test_who_meets_there(environment, method, monkeypatch):
    for name in ("MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    assert meeting.init_method() == method
