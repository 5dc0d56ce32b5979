"""Checks with one short connection whether the Hugging Face hub answers.

Without the check, the Hugging Face libraries would retry for minutes on a host without internet.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PROBE_TIMEOUT_S = 5.0


def endpoint() -> str:
    """The URL of the hub: `HF_ENDPOINT`, or https://huggingface.co where it is not set."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def reachable() -> bool:
    """True if a TCP connection to the hub, or to the proxy that leads there, opens within `PROBE_TIMEOUT_S`.

    False in the Hugging Face libraries' own offline mode (`HF_HUB_OFFLINE=1`).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(endpoint())
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    door = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else hub
    port = door.port or (443 if door.scheme == "https" else 80)
    try:
        socket.create_connection((door.hostname or "", port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextmanager
def offline(*modules: ModuleType) -> Iterator[None]:
    """Puts Hugging Face libraries into offline mode inside a `with` block: they read only their local caches.

    Each of `modules` has a flag `HF_HUB_OFFLINE`. Setting the environment variable of that name would have no effect
    here, because the libraries read it when they are imported.
    """
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
