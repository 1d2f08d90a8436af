"""Two nodes on this machine: two network namespaces with a cable between them, and programs that run in each."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ADDRESSES = ("10.99.0.1", "10.99.0.2")
PORT = 29500  # free in a new namespace
CABLE = "cable"
BIN = Path(sys.executable).parent


class Nodes:
    """Two nodes; programs start on both at once, in process groups of their own.

    Args:
        names: Of the namespaces.
        folder: Where the programs run, and where their output goes.
    """

    def __init__(self, names, folder):
        self.names, self.folder = names, Path(folder)
        self._started = []

    def start(self, *arguments, launcher="lightning", devices=1, **environment):
        """`adam-mini ARGUMENTS` on both nodes, the processes of each started by Lightning or by torchrun."""
        options = ["--trainer.num_nodes", 2, "--trainer.devices", devices]
        command = [BIN / "adam-mini", *arguments, *options]
        processes = []
        for node, name in enumerate(self.names):
            own, before = {"GLOO_SOCKET_IFNAME": CABLE}, []
            if launcher == "lightning":
                own |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "NODE_RANK": str(node)}
            else:
                before = [BIN / "torchrun", "--nnodes=2", f"--nproc-per-node={devices}", "--no-python"]
                before += [f"--node-rank={node}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
            command_of_node = ["ip", "netns", "exec", name, *before, *command]
            process = start_in_session(command_of_node, self.folder, **own | environment)
            processes.append(process)
        self._started += processes
        return processes

    def cut(self):
        """Pull the cable: packets are lost, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", CABLE, "down")

    def mend(self):
        """Plug it in again."""
        _ip("-n", self.names[0], "link", "set", CABLE, "up")

    def close(self):
        """End what still runs, and remove the namespaces."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextlib.contextmanager
def two_nodes(folder):
    """Two nodes for the time of a test; skips it where this process may not make namespaces."""
    names = [f"adam-mini-{os.getpid()}-{node}" for node in range(2)]
    nodes = Nodes(names, folder)
    try:
        _connect(names)
        yield nodes
    finally:
        nodes.close()


def _connect(names):
    if not shutil.which("ip"):
        pytest.skip("two nodes need the command ip, of the package iproute2")
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("netns", "exec", name, "true")
        _ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", CABLE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two nodes need network namespaces: {' '.join(error.stderr.split())}")


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def start_in_session(command, folder, **environment):
    """A program that leads a session, to which all that it starts belongs; its output goes to `process.log`."""
    number = len(list(Path(folder).glob("program-*.log")))
    with (Path(folder) / f"program-{number}.log").open("x") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_without_ranks() | environment,
            start_new_session=True,
        )
    process.log = Path(log.name)
    return process


def _without_ranks():
    """The environment without what a test of this process has left there for ranks."""
    left = {"LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ADAM_MINI_RUN_DIR"}
    return {key: value for key, value in os.environ.items() if key not in left}


def wait_for_all(processes, seconds):
    """Exit codes, in order, when all have ended and nothing that they started is left; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes and not any(members(process.pid) for process in processes):
            return codes
        time.sleep(0.05)
    left = {process.pid: members(process.pid) for process in processes}
    logs = "\n".join(f"{process.log}:\n{process.log.read_text()[-2000:]}" for process in processes)
    raise AssertionError(f"after {seconds} s still there: {left}\n{logs}")


def members(session):
    """Processes, but for zombies, that a leader of a session and its children have started, itself included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)
