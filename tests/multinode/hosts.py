"""Two hosts on this machine, each with its own network, host name, processes and sshd. They share files and cores.

with two_hosts(folder) as hosts:
    hosts.run("host-a", ["ssh", "host-b", "hostname"])

A host is a set of namespaces whose first process the test starts. When this process or the test ends, the kernel ends
every process of the host and removes its network. The network, sshd and files of the machine itself are not changed:
the settings of ssh and the names of hosts are in files that are mounted inside the hosts only.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

#: Addresses in the network 192.0.2.0/24, which is reserved for examples.
ADDRESSES = {"host-a": "192.0.2.1", "host-b": "192.0.2.2"}
#: Name of the network interface that connects the hosts, on both of them.
WIRE = "wire0"
_PACKAGES = {
    "ip": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
#: setpriv makes the kernel end a host when the process that made it ends in any way.
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc")
#: The script of a host's first process. It adopts processes that lost their parent, and ends when its standard input is
#: closed.
_INIT = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
mount --bind shadow /etc/shadow
[ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh
hostname "$1"
ip link set lo up
echo ready
read -r _ || true
"""
_SSH_CONFIG = """
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    BatchMode yes
    ConnectTimeout 5
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
_SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PidFile {folder}/{name}.pid
"""
_START_S = 20


def why_not() -> str | None:
    """Why two hosts cannot be made on this machine; None where they can."""
    missing = [package for tool, package in _PACKAGES.items() if not shutil.which(tool)]
    if missing:
        return f"two hosts need {', '.join(missing)}: apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid():
        return "two hosts need root"
    veth = "mount -t tmpfs tmpfs /run && ip link add wire0 type veth peer name wire1"
    probe = subprocess.run([*_UNSHARE, "sh", "-c", veth], check=False, capture_output=True, text=True)
    if probe.returncode:
        return f"two hosts need namespaces and veth (CAP_SYS_ADMIN, CAP_NET_ADMIN): {probe.stderr.strip()}"
    return None


@dataclass
class Hosts:
    """`host-a` and `host-b`, connected by one network cable (a veth pair)."""

    folder: Path
    _init: dict[str, psutil.Process] = field(default_factory=dict)
    """Name of a host -> its first process, with the process id that it has outside of the host."""

    @property
    def names(self) -> list[str]:
        return list(ADDRESSES)

    def on(self, host: str, command: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The command line that starts `command` on a host, in the folder `cwd`, or else in `folder`."""
        enter = ["nsenter", f"--target={self._init[host].pid}", *_NAMESPACES]
        return [*enter, "env", f"--chdir={cwd or self.folder}", *command]

    def run(self, host: str, command: Sequence[str], *, timeout_s: float = 20) -> str:
        """Runs a command on a host and returns its output.

        Raises:
            AssertionError: the command failed; the message has its output.
        """
        done = subprocess.run(
            self.on(host, command),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{host}: {' '.join(command)}: {done.stdout}"
        return done.stdout

    def hostfile(self, slots: Mapping[str, int]) -> Path:
        """Writes a hostfile with these slots, such as {"host-a": 1, "host-b": 1}, and returns its path."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host} slots={number}\n" for host, number in slots.items()))
        return path

    def write_names(self, names: Mapping[str, str]) -> None:
        """Gives both hosts an /etc/hosts that has localhost and these names with their addresses."""
        lines = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items())
        # Overwritten in place, because this very file is mounted.
        (self.folder / "hosts").write_text(lines)

    def processes(self, host: str, word: str = "") -> list[psutil.Process]:
        """The live processes of a host that have `word` in their command line, without its first process and sshd."""
        init, found = self._init[host], []
        for process in psutil.process_iter(["name", "cmdline", "status"]):
            with contextlib.suppress(OSError):
                about = process.info
                alive = about["status"] != psutil.STATUS_ZOMBIE and about["name"] != "sshd" and process != init
                if alive and _namespace(process.pid) == _namespace(init.pid):
                    found += [process] if word in " ".join(about["cmdline"] or ()) else []
        return found

    def start_sshd(self, host: str) -> None:
        """Starts sshd on a host, and waits until it listens."""
        config, pid_file = self.folder / f"{host}.sshd_config", self.folder / f"{host}.pid"
        config.write_text(_SSHD_CONFIG.format(address=ADDRESSES[host], folder=self.folder, name=host))
        self.run(host, [str(shutil.which("sshd")), "-f", str(config), "-E", str(self.folder / f"{host}.sshd.log")])
        _wait_for(pid_file.exists, f"sshd on {host}")

    def stop_sshd(self, host: str) -> None:
        """Stops sshd on a host. New connections are then refused; open connections stay."""
        pid_file = self.folder / f"{host}.pid"
        self.run(host, ["kill", pid_file.read_text().strip()])
        # sshd removes the file after it has closed its socket.
        _wait_for(lambda: not pid_file.exists(), f"the end of sshd on {host}")

    def cut(self, host: str = "host-b") -> None:
        """Cuts the network cable: packets are lost, and connections stay open without an error."""
        self.run(host, ["ip", "link", "set", WIRE, "down"])

    # Making and ending the hosts.

    def _start(self, host: str) -> subprocess.Popen:
        """Starts the first process of a host. It ends when its standard input is closed."""
        unshare = subprocess.Popen(
            [*_UNSHARE, "bash", "-c", _INIT, "init", host],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert unshare.stdout
        line = unshare.stdout.readline()
        assert line == "ready\n", f"{host} did not start: {line}{unshare.stdout.read() if line else ''}"
        [self._init[host]] = psutil.Process(unshare.pid).children()
        return unshare

    def _connect(self) -> None:
        """Connects the hosts by a veth pair. Neither end is ever in the machine's own network namespace."""
        [(first, _), (_, second)] = self._init.items()
        ends = ["type", "veth", "peer", "name", WIRE, "netns", str(second.pid)]
        # Not through `run`, because the process id of the other host is not valid inside a host.
        enter = ["nsenter", f"--target={self._init[first].pid}", "--net"]
        subprocess.run([*enter, "ip", "link", "add", WIRE, *ends], check=True, capture_output=True)
        for host, address in ADDRESSES.items():
            self.run(host, ["ip", "address", "add", f"{address}/24", "dev", WIRE])
            self.run(host, ["ip", "link", "set", WIRE, "up"])


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Makes the hosts for a `with` block. At its end, also after a failure, only files in `folder` are left."""
    hosts = Hosts(folder)
    hosts.write_names(ADDRESSES)
    (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
    # sshd refuses locked accounts, and on some systems root's account is locked.
    (folder / "shadow").write_text("root:*:20000:0:99999:7:::\n")
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
    subprocess.run(keygen, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    with contextlib.ExitStack() as stack:
        for host in ADDRESSES:
            unshare = hosts._start(host)
            stack.callback(_end, unshare, hosts._init[host])
        hosts._connect()
        for host in ADDRESSES:
            hosts.start_sshd(host)
        yield hosts


def _end(unshare: subprocess.Popen, init: psutil.Process) -> None:
    """Ends a host, and waits until all of its processes have ended: the first process ends last."""
    with contextlib.suppress(psutil.NoSuchProcess):
        init.kill()
    unshare.wait(_START_S)
    for pipe in (unshare.stdin, unshare.stdout):
        assert pipe
        pipe.close()


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")


def _wait_for(probe: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not probe():
        assert time.monotonic() < deadline, f"{what} did not come within {_START_S} s"
        time.sleep(0.02)
