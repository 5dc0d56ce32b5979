"""`python -m stack.launch.probe`: reports the state of a host. Runs on each host before a launch.

Reads a `Question` as one JSON line from standard input, and writes an `About` as one JSON line to standard output. This
module does not import torch: versions come from the packages' metadata and devices from nvidia-smi, so that the answer
takes about a second.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import psutil

import stack
from stack.plan.policies import local_devices

#: Packages that must have the same version on all hosts. NCCL is in a wheel of its own, named after the CUDA version.
_PACKAGES = ("torch", "deepspeed", "transformers")
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_SMI = "name,memory.total,memory.free,driver_version"
_SMI_S = 10
_POLL_S = 0.1

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """What the driver asks a host."""

    folder: str
    """Where the run directory will be made."""
    token: str
    """Name of a file that the driver has made in the folder."""
    answer: str
    """Name of the file that the host must write there."""
    peer: str | None
    """Another host of the run: the first host, or for the first host the second."""
    wait_s: float
    """Longest wait for the token in s: a file server may show the file late."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; memory in MiB."""

    name: str
    total_mib: int
    free_mib: int


@dataclass(frozen=True)
class Route:
    """The route to the peer, as the kernel chooses it."""

    peer: str
    """The peer's address, as this host resolves its name."""
    source: str
    """Address of this host on the route."""
    interface: str | None
    """Network interface that has the source address."""


@dataclass(frozen=True)
class About:
    """The state of a host."""

    hostname: str
    python: str
    """The interpreter's path."""
    versions: dict[str, str | None]
    driver: str | None
    gpus: list[Gpu]
    gpu_fault: str | None
    """Why nvidia-smi does not answer on a host that has NVIDIA devices."""
    usable_gpus: int
    """Number of GPUs that CUDA_VISIBLE_DEVICES allows."""
    memory_free: int
    """Free memory of the host, in bytes."""
    shm_bytes: int
    """Size of /dev/shm, which NCCL uses between the ranks of one host."""
    addresses: dict[str, list[str]]
    """IPv4 and IPv6 addresses by interface."""
    own_address: str | None
    """The address of the host's own name there. gloo listens on this address unless an interface is set."""
    route: Route | None
    route_fault: str | None
    folder_fault: str | None
    """Why the run directory cannot be used from there."""
    asked: float
    """When the question had been read, by the host's clock (Unix time, s)."""
    answered: float
    """When the answer was written, by the same clock."""

    @classmethod
    def from_json(cls, line: str) -> "About":
        """The answer that `main` printed.

        Raises:
            ValueError, KeyError, TypeError: the line is no answer.
        """
        raw = json.loads(line)
        route = Route(**raw["route"]) if raw["route"] else None
        return cls(**{**raw, "gpus": [Gpu(**gpu) for gpu in raw["gpus"]], "route": route})


def main() -> None:
    """Answers the question on standard input."""
    question = Question(**json.loads(sys.stdin.readline()))
    asked = time.time()
    gpus, driver, gpu_fault = _gpus()
    peer = question.peer
    route, route_fault = _found(lambda: _route(peer)) if peer else (None, None)
    about = About(
        hostname=socket.gethostname(),
        python=sys.executable,
        versions=_versions(),
        driver=driver,
        gpus=gpus,
        gpu_fault=gpu_fault,
        usable_gpus=local_devices(),
        memory_free=psutil.virtual_memory().available,
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        addresses=_addresses(),
        own_address=_found(lambda: socket.gethostbyname(socket.gethostname()))[0],
        route=route,
        route_fault=route_fault,
        folder_fault=_folder_fault(question),
        asked=asked,
        answered=time.time(),
    )
    print(json.dumps(asdict(about)), flush=True)


def _found(search: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """The result of a search and None, or None and the reason of the failure."""
    try:
        return search(), None
    except OSError as error:
        return None, error.strerror or str(error)


def _versions() -> dict[str, str | None]:
    nccl = [version for name in _NCCL if (version := _version(name))]
    return {
        "stack": f"{stack.__version__} (source {_source()})",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "nccl": nccl[0] if nccl else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source() -> str:
    """Digest of stack's own source, because two checkouts of one version may differ."""
    digest = hashlib.blake2b(digest_size=4)
    folder = Path(stack.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _gpus() -> tuple[list[Gpu], str | None, str | None]:
    """The GPUs, the driver's version, and why nvidia-smi does not answer although there are devices."""
    if not local_devices():
        return [], None, None
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SMI_S).stdout
    except FileNotFoundError:
        return [], None, "there is no nvidia-smi"
    except subprocess.TimeoutExpired:
        return [], None, f"nvidia-smi did not answer within {_SMI_S} s"
    except subprocess.CalledProcessError as error:
        return [], None, f"nvidia-smi: {(error.stdout or error.stderr).strip()}"
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
    return [Gpu(name, _mib(total), _mib(free)) for name, total, free, _ in rows], rows[0][3] if rows else None, None


def _mib(cell: str) -> int:
    # nvidia-smi prints no number for a GPU that shares the memory of the host.
    return int(cell) if cell.isdigit() else 0


def _addresses() -> dict[str, list[str]]:
    return {
        # A link-local address ends with `%` and the interface, which is cut off.
        interface: [a.address.partition("%")[0] for a in found if a.family in (socket.AF_INET, socket.AF_INET6)]
        for interface, found in psutil.net_if_addrs().items()
    }


def _route(peer: str) -> Route:
    """Asks the kernel. Connecting a datagram socket gives it a source address and sends nothing.

    Raises:
        OSError: the peer's name does not resolve, or there is no route to the peer.
    """
    family, _, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        source = probe.getsockname()[0].partition("%")[0]
    interface = next((name for name, own in _addresses().items() if source in own), None)
    return Route(str(address[0]), source, interface)


def _folder_fault(question: Question) -> str | None:
    """Looks for the driver's file in the folder of runs, and writes the host's own file there. Returns the fault."""
    folder = Path(question.folder)
    deadline = time.monotonic() + question.wait_s
    while True:
        try:
            # Listing makes an NFS client ask the server again. A lookup by name could return a cached "not found".
            if question.token in os.listdir(folder):
                break
            fault = "is a different folder there; put run.root on a file system that all hosts share"
        except FileNotFoundError:
            fault = "does not exist there; put run.root on a file system that all hosts share"
        except OSError as error:
            return f"cannot be read there ({error.strerror}); make it readable for this user"
        if time.monotonic() > deadline:
            return fault
        time.sleep(_POLL_S)
    try:
        (folder / question.answer).write_text(question.answer)
    except OSError as error:
        return f"cannot be written there ({error.strerror}); make it writable for this user"
    return None


if __name__ == "__main__":
    main()
