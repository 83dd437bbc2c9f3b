"""Workers and nodes that die: torchrun starts the run again, which continues by itself (`--resume auto`)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cli_helpers
import pytest
from ports import free_port
from test_resume_processes import recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads Linux's /proc"),
]
LIMIT = 600
"""Seconds until a run that hangs fails."""
NUM_STEPS = 40


def agent(path: Path, *launcher: str, node: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """torchrun with train.py, which saves every second step; `node` is the command that runs it on another machine."""
    options = ["--options", f"run.max_iters={NUM_STEPS}", "run.max_epoch=99", "run.batch_size_train=2"]
    argv = ["train.py", "--cfg-path", str(path), "--job-id", "job", "--resume", "auto", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cli_helpers.ROOT), **environment}
    return subprocess.Popen(
        [*node, sys.executable, "-m", "torch.distributed.run", *launcher, *argv],
        env=environment,
        cwd=cli_helpers.ROOT,
        text=True,
        stdout=(path.parent / f"agent{time.monotonic_ns()}.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def workers(agent_: int) -> dict[int, int]:
    """The ranks of the processes that an agent started, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0") if parent == agent_ else []
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            continue
        settings = dict(setting.partition(b"=")[::2] for setting in environment)
        if b"RANK" in settings:
            found[int(folder.name)] = int(settings[b"RANK"])
    return found


def wait_until(condition: Callable[[], bool], *agents: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert all(one.poll() is None for one in agents), "ended by itself"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


def num_steps(job: Path) -> int:
    return (job / "log.txt").read_text().count('"loss"') if (job / "log.txt").exists() else 0


def assert_not_interrupted(path: Path) -> None:
    """The log has the losses and rates of one process that ran to the end; steps after the checkpoint occur twice."""
    options = [f"run.max_iters={NUM_STEPS}", "run.max_epoch=99"]
    assert cli_helpers.train(path, *options, job="whole") == 0
    whole, job = (cli_helpers.steps(path.parent / "output" / name) for name in ("whole", "job"))
    last = {row["step"]: row for row in job}
    assert len(job) > len(last) or len(job) == NUM_STEPS
    assert [last[step]["loss"] for step in range(1, NUM_STEPS + 1)] == pytest.approx(
        [row["loss"] for row in whole], rel=1e-4
    )
    assert [last[row["step"]]["lr"] for row in whole] == [row["lr"] for row in whole]


def printed(folder: Path) -> str:
    """What the agents and their workers printed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("agent*.txt")))


def end(agents: list[subprocess.Popen[str]]) -> None:
    for one in agents:
        if one.poll() is None:
            one.terminate()  # torchrun ends its workers
        one.wait(60)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_restarted_and_the_run_continues(rank: int, tmp_path: Path, shapes_data: Path) -> None:
    path = recipe(tmp_path)
    run = agent(path, "--nproc_per_node=2", "--max-restarts=9", f"--master_port={free_port()}")
    job = tmp_path / "output" / "job"
    try:
        wait_until(lambda: num_steps(job) > 10, run)
        (killed,) = [process for process, its_rank in workers(run.pid).items() if its_rank == rank]
        os.kill(killed, signal.SIGKILL)
        assert run.wait(LIMIT) == 0, printed(tmp_path)
    finally:
        end([run])
    assert "resumed " in (job / "console.txt").read_text()
    assert_not_interrupted(path)


def has_network_namespaces() -> bool:
    """Whether this process may make networks of its own, as root may on most machines."""
    if shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"]).returncode == 0


@dataclass
class Nodes:
    """Two machines: how to run a command on each, their addresses, and what their processes are told."""

    commands: Sequence[Sequence[str]]
    addresses: Sequence[str]
    environment: Mapping[str, str]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two networks joined by a virtual cable where this process may make them, else this machine twice."""
    if not has_network_namespaces():
        yield Nodes([(), ()], ["localhost", "localhost"], {})
        return
    names = [f"node{number}x{os.getpid()}" for number in (1, 2)]
    commands = [f"netns add {name}" for name in names]
    commands += ["link add eth0 netns {} type veth peer name eth0 netns {}".format(*names)]
    addresses = ["10.87.0.1", "10.87.0.2"]
    commands += [f"-n {name} addr add {own}/24 dev eth0" for name, own in zip(names, addresses, strict=True)]
    commands += [f"-n {name} link set {device} up" for name in names for device in ("lo", "eth0")]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        # the machine's name has no address in these networks, so gloo is told the device; no server knows any name
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "RES_OPTIONS": "timeout:1 attempts:1"}
        yield Nodes([["ip", "netns", "exec", name] for name in names], addresses, environment)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


def test_two_nodes_of_which_one_dies(nodes: Nodes, tmp_path: Path, shapes_data: Path) -> None:
    """Two agents meet at an address; after one dies, the other continues alone, with the same global batch."""
    path, port = recipe(tmp_path), free_port()
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={nodes.addresses[0]}:{port}", "--rdzv-id=test", "--max-restarts=9"]
    meet += ["--nnodes=1:2", "--nproc_per_node=1"]
    conf = "--rdzv-conf=last_call_timeout=15,keep_alive_interval=1,is_host="
    job, agents = tmp_path / "output" / "job", []
    try:
        for node, own, is_host in zip(nodes.commands, nodes.addresses, ("true", "false"), strict=True):  # [1] may die
            launcher = [*meet, f"{conf}{is_host}", f"--local-addr={own}"]
            agents.append(agent(path, *launcher, node=node, **nodes.environment))
        wait_until(lambda: num_steps(job) > 10 and "x 2 processes" in (job / "console.txt").read_text(), *agents)
        for process in (agents[1].pid, *workers(agents[1].pid)):
            os.kill(process, signal.SIGKILL)
        assert agents[0].wait(LIMIT) == 0, printed(tmp_path)
    finally:
        end(agents)
    console = (job / "console.txt").read_text()
    assert "was written by 2 processes, this run has 1" in console
    assert_not_interrupted(path)
