"""Checks all hosts of a run at once before a rank is started, within a time limit, and names the hosts that differ."""

import contextlib
import ipaddress
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stack.errors import HostError
from stack.health.odd import odd_ones
from stack.launch.hosts import Host, module_on
from stack.launch.probe import About, Question

#: A larger difference of clocks is reported to the user. It stops no run, because training does not depend on the
#: clocks. But the clocks of the hosts decide which rank counts as the first that failed.
SKEW_S = 5.0
#: NCCL keeps some MB of /dev/shm for each pair of ranks; containers get 64 MB unless told otherwise.
_SHM_BYTES = 1 << 30
#: A file server may take this long to show a file to others.
_VISIBLE_S = 10.0
_POLL_S = 0.1
_SSH_FAILED = 255
_NOT_FOUND = (126, 127)
#: Part of ssh's message in lower case, and the message for the user.
_SSH_FAULTS = (
    ("could not resolve", "its name does not resolve here; correct the hostfile, or /etc/hosts"),
    ("connection refused", "ssh is refused; start sshd there"),
    ("permission denied", "ssh asks for a password; make `ssh {0} true` work without one (ssh-copy-id {0})"),
    ("host key verification failed", "ssh does not know its host key; run `ssh {0} true` once by hand"),
    ("timed out", "cannot be reached; check that it is on and that its port 22 is open"),
    ("no route to host", "cannot be reached; check that it is on and that its port 22 is open"),
    ("unreachable", "cannot be reached; check that it is on and that its port 22 is open"),
)


@dataclass(frozen=True)
class Report:
    """The answer of a host, and its faults and notes. These are lines for the user that begin with the host's name."""

    host: Host
    about: About | None
    """None if the host did not answer."""
    skew_s: float | None = None
    """Least number of seconds by which its clock is ahead of this host's; 0 if the answer took longer than that."""
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The host's name, as in the hostfile."""
        return self.host.name

    @property
    def address(self) -> str:
        """Its address as the other hosts reach it; the loopback address if there are no other hosts."""
        return self.about.route.source if self.about and self.about.route else "127.0.0.1"

    @property
    def interface(self) -> str | None:
        """Its network interface that leads to the other hosts; None if there are no other hosts."""
        return self.about.route.interface if self.about and self.about.route else None


def check_hosts(
    hosts: Sequence[Host], folder: Path, *, timeout_s: float = 30.0, requests: Sequence[signal.Signals] = ()
) -> list[Report]:
    """`examine`, for a launch: a report of each host, in their order, none with a fault.

    Raises:
        HostError: a host cannot be used. The message has the first fault, and the number of the other faults.
    """
    reports = examine(hosts, folder, timeout_s=timeout_s, requests=requests)
    faults = [fault for report in reports for fault in report.faults]
    if faults:
        more = f" (and {len(faults) - 1} more; stack doctor lists them)" if len(faults) > 1 else ""
        raise HostError(faults[0] + more)
    return reports


def examine(
    hosts: Sequence[Host], folder: Path, *, timeout_s: float = 30.0, requests: Sequence[signal.Signals] = ()
) -> list[Report]:
    """Runs the probe on all hosts at the same time, and compares the answers.

    Args:
        folder: where the run directory will be made. Created if it does not exist.
        timeout_s: a host that has not answered by then cannot be used.
        requests: signals that asked this process to end, as they come in; after the first one no host is waited for.

    Raises:
        HostError: this host cannot write to the folder.
    """
    with _tokens(folder) as token, ThreadPoolExecutor(len(hosts)) as pool:
        questions = [
            Question(str(folder), token, f"{token}.{number}", _peer(hosts, number), min(_VISIBLE_S, timeout_s / 2))
            for number in range(len(hosts))
        ]
        reports = list(pool.map(lambda host, question: _ask(host, question, timeout_s, requests), hosts, questions))
        reports = [
            _seen_from_here(report, folder / question.answer)
            for report, question in zip(reports, questions, strict=True)
        ]
    return _compared(reports)


def _peer(hosts: Sequence[Host], number: int) -> str | None:
    """The host whose address decides which network interface a host uses."""
    if len(hosts) == 1:
        return None
    return hosts[0 if number else 1].name


@contextlib.contextmanager
def _tokens(folder: Path) -> Iterator[str]:
    """Makes a file by which other hosts recognise the folder. Removes that file and those of the hosts at the end."""
    token = f".stack-preflight-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError as error:
        raise HostError(f"{folder} cannot be written here ({error.strerror}); set run.root to a writable folder") from (
            error
        )
    try:
        yield token
    finally:
        for file in folder.glob(f"{token}*"):
            file.unlink(missing_ok=True)


def _ask(host: Host, question: Question, timeout_s: float, requests: Sequence[signal.Signals]) -> Report:
    """Runs the probe on a host."""
    command = module_on(host, "stack.launch.probe")
    began = time.time()
    try:
        # A session of its own: Ctrl-C reaches this process only.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Report(host, None, faults=(f"{host.name}: {command[0]} cannot be started here ({error.strerror})",))
    with process:
        try:
            told, complaint = _listen(process, json.dumps(asdict(question)) + "\n", timeout_s, requests)
        except subprocess.TimeoutExpired:
            process.kill()
            return Report(
                host, None, faults=(f"{host.name}: no answer within {timeout_s:g} s; the host may be overloaded",)
            )
    ended = time.time()
    about = _answer(told)
    if about is None:
        why = _why_no_answer(host, process.returncode, complaint)
        return Report(host, None, faults=(f"{host.name}: {why}",))
    return Report(host, about, skew_s=_skew(about, began, ended))


def _listen(
    process: subprocess.Popen, question: str, timeout_s: float, requests: Sequence[signal.Signals]
) -> tuple[str, str]:
    """
    Raises:
        TimeoutExpired: the probe did not answer in time, or a request to end came first.
    """
    text: str | None = question
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return process.communicate(text, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if requests or time.monotonic() > deadline:
                raise
            text = None


def _answer(told: str) -> About | None:
    """The last line that is an answer; a login shell may have printed lines before."""
    for line in reversed(told.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return About.from_json(line)
    return None


def _why_no_answer(host: Host, code: int, complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code} and no output"
    # `module_on` starts Python at the same path as on this host.
    python = sys.executable
    if code == _SSH_FAILED:
        words = complaint.lower()
        return next((what.format(host.name) for said, what in _SSH_FAULTS if said in words), f"ssh failed: {last}")
    if code in _NOT_FOUND:
        return f"there is no {python}; install the same environment at the same path there"
    if "No module named" in complaint:
        return f"{python} lacks a module ({last}); install the same stack there"
    return f"{python} -m stack.launch.probe failed: {last}"


def _skew(about: About, began: float, ended: float) -> float:
    """The least number of seconds by which the host's clock is ahead (positive) or behind. The question was read after
    `began` and the answer was written before `ended`, so the time that ssh and the start of Python take does not
    count."""
    ahead, behind = about.answered - ended, began - about.asked
    return max(ahead, 0.0) or -max(behind, 0.0)


def _seen_from_here(report: Report, file: Path) -> Report:
    """Adds a fault if the host and this host do not see the same folder for runs."""
    about, name = report.about, report.host.name
    if about is None:
        return report
    if about.folder_fault:
        return _with(report, faults=[f"{name}: {file.parent} {about.folder_fault}"])
    deadline = time.monotonic() + _VISIBLE_S
    while file.name not in os.listdir(file.parent):
        if time.monotonic() > deadline:
            why = f"a file from there is not visible here after {_VISIBLE_S:g} s; put run.root on a shared file system"
            return _with(report, faults=[f"{name}: {file.parent}: {why}"])
        time.sleep(_POLL_S)
    return report


def _with(report: Report, *, faults: Sequence[str] = (), notes: Sequence[str] = ()) -> Report:
    return replace(report, faults=(*report.faults, *faults), notes=(*report.notes, *notes))


def _compared(reports: list[Report]) -> list[Report]:
    """Adds the faults and notes that need all answers."""
    abouts = {number: report.about for number, report in enumerate(reports) if report.about}
    faults: dict[int, list[str]] = {number: [] for number in range(len(reports))}
    notes: dict[int, list[str]] = {number: [] for number in range(len(reports))}
    for who, key, has, others in odd_ones({number: about.versions for number, about in abouts.items()}):
        name = reports[who].name
        faults[who].append(
            f"{name} has {_version(key, has)}, the others {others or 'none'}; install the same version there"
        )
    for who, key, has, others in odd_ones({number: _hardware(about) for number, about in abouts.items()}):
        notes[who].append(f"{reports[who].name} has {_version(key, has)}, the others {others or 'none'}")
    on_gpus = any(about.usable_gpus for about in abouts.values())
    for number, about in abouts.items():
        report = reports[number]
        if on_gpus:
            faults[number] += _devices(report.host, about)
        peer = 0 if number else 1
        # A peer that has not answered has a fault of its own already.
        if len(reports) > 1 and peer in abouts:
            faults[number] += _route(report.name, reports[peer].name, about)
            notes[number] += _own_name(report.name, about)
        notes[number] += _remarks(report, about)
    return [_with(report, faults=faults[number], notes=notes[number]) for number, report in enumerate(reports)]


def _hardware(about: About) -> dict[str, str | None]:
    """Hardware that may differ between hosts. The slowest host then sets the pace."""
    return {"driver": about.driver, "GPU": about.gpus[0].name if about.gpus else None}


def _version(key: str, value: object) -> str:
    return f"{key} {value}" if value else f"no {key}"


def _devices(host: Host, about: About) -> list[str]:
    if about.gpu_fault:
        return [f"{host.name}: {about.gpu_fault}; check the NVIDIA driver there"]
    if about.usable_gpus < host.slots:
        nearest = f"launch.ranks_per_node={about.usable_gpus}" if about.usable_gpus else "other hosts"
        return [f"{host.name} has {about.usable_gpus or 'no'} GPUs for {host.slots} ranks; use {nearest}"]
    return []


def _route(name: str, peer: str, about: About) -> list[str]:
    """Faults of the route to another host of the run."""
    if about.route is None:
        return [f"{name}: {peer} cannot be reached from there ({about.route_fault}); check /etc/hosts there"]
    if ipaddress.ip_address(about.route.peer).is_loopback:
        return [
            f"{name} resolves {peer} to itself ({about.route.peer}); use a name in the hostfile that all hosts know"
        ]
    return []


def _own_name(name: str, about: About) -> list[str]:
    """A note if the host's own name resolves to a loopback address, as 127.0.1.1 on Debian. gloo would listen on that
    address, and no other host could connect."""
    if about.own_address is None or ipaddress.ip_address(about.own_address).is_loopback:
        where = f"resolves to {about.own_address}" if about.own_address else "does not resolve"
        return [f"{name}: its own name {about.hostname} {where}; gloo needs GLOO_SOCKET_IFNAME there"]
    return []


def _remarks(report: Report, about: About) -> list[str]:
    """Notes that stop no run but may explain an error."""
    name, found = report.host.name, []
    if report.skew_s and abs(report.skew_s) > SKEW_S:
        which = "ahead of" if report.skew_s > 0 else "behind"
        found.append(f"{name}: its clock is {abs(report.skew_s):.1f} s {which} this host's; set it by NTP")
    if about.gpus and about.shm_bytes < _SHM_BYTES:
        found.append(f"{name}: /dev/shm has {about.shm_bytes / 1e6:.0f} MB, NCCL needs 1 GB (docker run --shm-size=1g)")
    for number, gpu in enumerate(about.gpus):
        if gpu.free_mib < 0.9 * gpu.total_mib:
            used = (gpu.total_mib - gpu.free_mib) / 1024
            found.append(f"{name}: another process has {used:.1f} GiB of GPU {number}")
    return found
