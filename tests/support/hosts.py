"""Several hosts on one machine: namespaces of Linux, on a network of their own, without a disk that they share.

A laboratory is a program that `isolated` starts in namespaces of its own. There it makes a `Switch`, and `Host`s. A
host has an address, a process tree, /dev/shm and /tmp. It sees the machine's own files, and cannot write them. When the
first process of such a tree ends, the kernel ends all others. So nothing outlives a host or a killed test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.paths import ROOT

NETWORK = "10.77.0"
SWITCH_ADDRESS = f"{NETWORK}.254"
SHARED_MEMORY_MIB = 1024
"""Of /dev/shm of a host, at most."""

NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts")
LABORATORY = ("unshare", "--map-root-user", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
BEING_A_HOST = f"""
set -e
hostname "$1"
mount -t tmpfs -o size={SHARED_MEMORY_MIB}m tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
# A checkout below /tmp would be hidden by the host's own.
case "$3" in /tmp/*) mkdir -p "$2/$1/${{3#/tmp/}}" && mount --bind "$3" "$2/$1/${{3#/tmp/}}" ;; esac
mount --rbind "$2/$1" /tmp
mount -o remount,bind,ro /
mkdir -p /tmp/home
echo ready
# Ends with whoever holds the other end of the pipe. Until then bash buries the host's orphans.
while read -r; do :; done
"""


def reason_against_hosts() -> str | None:
    """Why this machine allows no laboratory; None where it does."""
    try:
        tried = subprocess.run(
            [*LABORATORY, "sh", "-c", "ip link add bridge type bridge && mount -t tmpfs tmpfs /dev/shm"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as missing:
        return f"{missing.filename} is not installed"
    return None if tried.returncode == 0 else f"no namespaces for tests here: {tried.stderr.strip()}"


def isolated(module: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Starts `python -m module` as a laboratory; with `end_with_caller` it ends when the caller dies, too."""
    return subprocess.Popen(
        [*LABORATORY, sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end_with_caller() -> None:
    """In a laboratory, once: it ends when its input ends, whatever it is doing."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


class Switch:
    """The network of the hosts, and the place of their files. The laboratory itself has an address in it."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        """
        Args:
            directory: holds a folder for each host, which is its /tmp.
            names: of the hosts; their addresses follow in order.
        """
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 1)}
        self.directory = directory
        known = {"localhost": "127.0.0.1", **self.addresses}
        (directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in known.items()))
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "switch", "type", "bridge")
        run("ip", "addr", "add", f"{SWITCH_ADDRESS}/24", "dev", "switch")
        run("ip", "link", "set", "switch", "up")


class Host:
    """A machine on the switch, until it loses power."""

    def __init__(self, name: str, switch: Switch) -> None:
        self.name, self.address = name, switch.addresses[name]
        self.files = switch.directory / name
        """Its /tmp, as it is called outside."""
        self.files.mkdir()
        self._first = subprocess.Popen(
            [
                *("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", BEING_A_HOST, "bash", name, str(switch.directory), str(ROOT)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stdout.readline() == "ready\n", f"{name} did not come up"
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text()
        self.pid = int(children)
        """Of its first process, as it is called outside."""
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        run("ip", "link", "set", name, "master", "switch", "up")
        for command in (
            ("ip", "addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("ip", "link", "set", "lo", "up"),
            ("ip", "link", "set", "eth0", "up"),
            ("ip", "route", "add", "default", "via", SWITCH_ADDRESS),
        ):
            run(*self._inside(), *command)

    def start(self, *command: object, output: Path) -> subprocess.Popen[bytes]:
        """Runs a command on this host, in the directory of the checkout."""
        environment = {**os.environ, "HOME": "/tmp/home", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with open(output, "ab") as stream:
            return subprocess.Popen(
                [*self._inside(), "env", f"--chdir={ROOT}", *(str(word) for word in command)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def shared_memory(self) -> list[str]:
        """The files in its /dev/shm, as paths below it."""
        root = Path("/proc", str(self.pid), "root", "dev", "shm")
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def processes(self, prefix: str) -> list[int]:
        """Ids of its processes whose name begins so. What `start` runs here has its parent outside."""
        own, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            # It may end after it was listed.
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == own and process.name().startswith(prefix):
                    found.append(process.pid)
        return found

    def lose_power(self) -> None:
        """Ends every process of this host at once; its memory, /dev/shm and link are gone with them."""
        os.kill(self.pid, signal.SIGKILL)
        self._first.wait()

    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--"]


def processes_with(variable: str) -> list[int]:
    """Ids of the running processes whose environment began with `NAME=value`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or belongs to somebody else
    return found


def wait_for_none_with(variable: str, *, timeout_s: float) -> list[int]:
    """The processes that are still there when the time is over."""
    deadline = time.monotonic() + timeout_s
    while left := processes_with(variable):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []
