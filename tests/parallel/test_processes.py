"""Two processes on one machine (gloo): they generate what one does, process 0 speaks for both, and they end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from children import receiving_interrupts
from facts import refuses, says
from PIL import Image
from process_worker import WAYS, generate

from distrijax.parallel import launchers, processes
from distrijax.parallel.mesh import MeshPlan, pick_devices

TESTS = Path(__file__).parents[1]
MINUTE = 60
READ = dict.fromkeys(WAYS, (0.8, 0.995)) | {
    "images in each, sharded weights": (1, 1),
    "sharded weights": (0.5, 0.6),
}
"""The least and the most of the checkpoint that each of two processes reads; the third way has all devices' parts in both."""
OTHER_ENDED = r"error: [^\n]*\bprocess [^\n]*"
"""What a process says last when another one has ended or never came; XLA's log may come before."""
GLOO = re.compile(
    r"(\[Gloo\] Rank |\d| is connected to | peer ranks\. |Expected number of connected peer ranks is : )*\s*"
)
"""A line of Gloo's log. Several threads write it piece by piece, so that one line may hold pieces of two, or none."""
LONG = 300  # seconds for what a loaded machine should have done by then

STEPPING = """
import functools, pathlib, sys, time
from distrijax.cli import start
start.begin(several=True)
from distrijax.cli import generate
from distrijax import DistriSDXLPipeline

def step(pipe, number, *_):
    pathlib.Path(sys.argv[1], str(number)).touch()
    time.sleep(0.05)

DistriSDXLPipeline.__call__ = functools.partialmethod(DistriSDXLPipeline.__call__, callback_on_step_end=step)
generate.main(sys.argv[2:])
"""
"""generate.py that tells of its steps by files in a folder, and takes long for them."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(*arguments: str | Path, cwd: Path, variables: dict[str, str] | None = None) -> subprocess.Popen:
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "examples")))
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with receiving_interrupts():
        return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, **pipes)


def flags(port: int, process_id: int, *others: str | Path) -> list[str]:
    """generate.py's, for one of two processes."""
    numbers = ["--num-processes", "2", "--process-id", str(process_id)]
    return ["--coordinator", f"127.0.0.1:{port}", *numbers, *map(str, others)]


class End(NamedTuple):
    """How a process ended, and what it printed besides Gloo's log."""

    code: int
    out: str
    err: str


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def end(started: subprocess.Popen, timeout: float = LONG) -> End:
    try:
        out, err = started.communicate(timeout=timeout)
    finally:
        started.kill()
    return End(started.returncode, "".join(line for line in out.splitlines(True) if not GLOO.fullmatch(line)), err)


@pytest.fixture(scope="module")
def generated(shallow_checkpoint, tmp_path_factory) -> list[list[dict[str, np.ndarray]]]:
    """For each of `WAYS`, what each of two processes got."""
    folder, coordinator = tmp_path_factory.mktemp("generated"), f"127.0.0.1:{free_port()}"
    arguments = [TESTS / "process_worker.py", shallow_checkpoint, folder, coordinator]
    both = [process(*arguments, str(process_id), cwd=folder) for process_id in (0, 1)]
    for ended in map(end, both):
        assert (ended.code, ended.err) == (0, ""), ended
    return [[dict(np.load(folder / f"{way}-{process_id}.npz")) for process_id in (0, 1)] for way in range(len(WAYS))]


@pytest.mark.parametrize("number", range(len(WAYS)), ids=list(WAYS))
def test_two_processes_generate_what_one_does_and_both_have_all_of_it(generated, shallow_checkpoint, number):
    """Of the checkpoint each reads what its devices hold: half of what is sharded, of the projections of the prompt too."""
    first, second = generated[number]
    needed, numbers = generate(shallow_checkpoint, list(WAYS)[number])
    least, most = READ[list(WAYS)[number]]
    assert all(least * numbers <= of_process["read"] <= most * numbers for of_process in (first, second))
    first, second = ({name: value for name, value in arrays.items() if name != "read"} for arrays in (first, second))
    assert first.keys() == second.keys() == needed.keys()
    for name, value in needed.items():
        np.testing.assert_array_equal(first[name], second[name], name)
        np.testing.assert_allclose(first[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def slurm(process_id: int, port: int) -> dict[str, str]:
    """What srun tells each of two tasks."""
    tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    of_this = {"SLURM_PROCID": str(process_id), "SLURM_LOCALID": str(process_id)}
    return {"SLURM_JOB_ID": str(port), "SLURM_STEP_NUM_NODES": "1", **tasks, **of_this}


def open_mpi(process_id: int, port: int) -> dict[str, str]:
    """What Open MPI 4's mpirun tells each of two ranks."""
    of_this = {"OMPI_COMM_WORLD_RANK": str(process_id), "OMPI_COMM_WORLD_LOCAL_RANK": str(process_id)}
    uri = f"{port * 2**12}.0;tcp://127.0.0.1:34911"
    return {"OMPI_MCA_orte_hnp_uri": uri, "OMPI_COMM_WORLD_SIZE": "2", **of_this}


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_a_launcher_tells_all_that_the_flags_would_and_process_0_alone_speaks_and_writes(
    shallow_checkpoint, tmp_path, launcher
):
    """Of the number that it makes of the job's, JAX makes a port; CPUs are divided as where a coordinator is given."""
    script, job, folders = TESTS.parent / "examples" / "generate.py", free_port(), [tmp_path / "0", tmp_path / "1"]
    settings = ["--model", shallow_checkpoint, "--devices", "4", "--image-size", "64", "--num-inference-steps", "3"]
    settings += ["--prompt", 100 * "red "]
    both = []
    for number, folder in enumerate(folders):
        folder.mkdir()
        both.append(process(script, *settings, cwd=folder, variables=launcher(number, job)))
    first, second = map(end, both)
    assert first.code == 0, first
    assert [line.split()[0] for line in first.out.splitlines()] == ["mesh", "image", "load", "compile", "run", "wrote"]
    says(first.out, "data 1", "cfg 2", "patch 2", 4, "virtual CPU")
    assert re.fullmatch(r"(warning: [^\n]*\b\d+ tokens\b.*\n)+", first.err)
    assert second == End(0, "", "")
    assert [[path.name for path in folder.iterdir()] for folder in folders] == [["distrijax.png"], []]
    with Image.open(folders[0] / "distrijax.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM), (0, signal.SIGINT)]
)
def test_a_process_that_ends_in_the_loop_ends_the_other_in_a_sentence(shallow_checkpoint, tmp_path, victim, how):
    steps = tmp_path / "steps"
    steps.mkdir()
    shared = ["--model", shallow_checkpoint, "--devices", "2", "--image-size", "64", "--num-inference-steps", "1000"]
    port = free_port()
    both = [process("-c", STEPPING, steps, *flags(port, number, *shared), cwd=tmp_path) for number in (0, 1)]
    try:
        started = time.monotonic()
        while not (steps / "5").exists():
            assert time.monotonic() - started < LONG
            assert all(one.poll() is None for one in both), [end(one, MINUTE) for one in both]
            time.sleep(0.05)
        both[victim].send_signal(how)
        other = end(both[1 - victim], MINUTE)
    finally:
        ended = end(both[victim], MINUTE)
    assert other.code == 1
    assert re.fullmatch(OTHER_ENDED, last_line(other.err))
    assert ended.code == (130 if how == signal.SIGINT else -how)
    assert ended.err == ("interrupted\n" if how == signal.SIGINT else "")
    assert list(tmp_path.iterdir()) == [steps]


def test_a_process_that_refuses_ends_the_other(shallow_checkpoint, tmp_path):
    port, shared = free_port(), ["--model", shallow_checkpoint, "--devices", "2", "--output", "image.gif"]
    script = TESTS.parent / "examples" / "generate.py"
    first, second = (
        end(one, MINUTE) for one in [process(script, *flags(port, number, *shared), cwd=tmp_path) for number in (0, 1)]
    )
    assert (first.code, first.out) == (1, "")
    assert re.fullmatch(r"error: .*\n", first.err)
    says(first.err, "--output", "image.gif", ".png")
    assert second.code == 1
    assert re.fullmatch(OTHER_ENDED, last_line(second.err))


@pytest.mark.parametrize(
    ("different", "told"),
    [
        ("--seed 1 --num-inference-steps 5 --prompt blue", ["seed", "num_inference_steps", "prompt"]),
        ("--sync-mode no_sync", ["config"]),
    ],
)
def test_processes_that_were_started_differently_say_how(shallow_checkpoint, tmp_path, different, told):
    port, shared = free_port(), ["--model", shallow_checkpoint, "--devices", "2", "--image-size", "64"]
    script = TESTS.parent / "examples" / "generate.py"
    both = [
        process(script, *flags(port, number, *shared, *own.split()), cwd=tmp_path)
        for number, own in enumerate(["", different])
    ]
    for ended in [end(one, MINUTE) for one in both]:
        assert ended.code == 1
        says(last_line(ended.err), "error: ", *told, "2 processes")
        assert not {"seed", "width", "model"} & (set(re.findall(r"\w+", last_line(ended.err))) - set(told))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_never_arrives_ends_the_other_in_a_sentence(tmp_path, process_id):
    script = TESTS.parent / "examples" / "generate.py"
    alone = process(script, *flags(free_port(), process_id, "--process-timeout", "3"), cwd=tmp_path)
    ended = end(alone, MINUTE)
    assert (ended.code, ended.out) == (1, "")
    assert re.fullmatch(OTHER_ENDED, last_line(ended.err))


def test_a_coordinator_in_use_is_refused():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with refuses("process 0", f"localhost:{port}", "Address already in use"):
            processes.initialize(f"localhost:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("h:1", 2, None), ["process_id", "coordinator, num_processes, process_id"]),
        ((None, None, 0), ["coordinator and num_processes", "coordinator, num_processes, process_id"]),
        (("h:1", 2, 2), ["process_id", "2 of 2", 0, 1]),
        (("h:1", 2, -1), ["process_id", -1, 0]),
        (("h:1", 0, 0), ["num_processes", 0, 1]),
        (("h", 2, 1), ["coordinator", "'h'", "HOST:PORT"]),
        (("h:99999", 2, 1), ["coordinator", "'h:99999'", "HOST:PORT"]),
        (("h:1", 2, 1, 3), ["devices", 3, "2 processes", "multiple of 2"]),
    ],
)
def test_wrong_coordinates_are_refused_in_a_sentence(arguments, told):
    with refuses(*told):
        processes.initialize(*arguments[:3], devices=arguments[3] if arguments[3:] else None)


def test_numpys_numbers_reach_jax_as_pythons(monkeypatch):
    given = []
    monkeypatch.setattr(processes, "_initialize", lambda *values, **_: given.extend(values))
    processes.initialize("h:1", np.int64(2), np.int64(1), timeout=np.int64(5))
    assert given == [5, "h:1", 2, 1]
    assert [type(value) for value in given] == [int, str, int, int]


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, 1),  # a batch script, outside of srun
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}, 16),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # salloc's shell
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "1"}, 1),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "SLURM_STEP_NODELIST": "a",
                "SLURM_NTASKS": "1",
            },
            2,
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ],
)
def test_a_launcher_is_asked_only_where_it_started_several(monkeypatch, variables, count):
    for launcher, counts in launchers.LAUNCHERS.items():
        for name in (launcher, *counts):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launchers.tasks() == count


class Device(NamedTuple):
    """Stands in for a device of some host."""

    process_index: int
    id: int


def hosts(*sizes: int) -> list[Device]:
    """The devices of hosts, in another order than JAX's."""
    return [Device(host, number) for number in range(max(sizes)) for host, size in enumerate(sizes) if number < size]


@pytest.mark.parametrize(
    ("plan", "crossing"),
    [
        (MeshPlan(1, 2, 8), "cfg"),  # two branches on two hosts of eight
        (MeshPlan(2, 2, 4), "data"),
        (MeshPlan(1, 1, 16), "patch"),
    ],
)
def test_the_first_axis_that_is_cut_crosses_from_host_to_host(plan, crossing):
    devices = pick_devices(hosts(8, 8), 16)
    grid = np.array([device.process_index for device in devices]).reshape(plan.data, plan.cfg, plan.patch)
    axis = ("data", "cfg", "patch").index(crossing)
    halves = np.split(grid, 2, axis)
    assert [np.unique(half).tolist() for half in halves] == [[0], [1]]


def test_fewer_devices_are_taken_equally_from_all_hosts():
    assert pick_devices(hosts(8, 8), 4) == [Device(0, 0), Device(0, 1), Device(1, 0), Device(1, 1)]
    assert len(pick_devices(hosts(8, 4), 12)) == 12


@pytest.mark.parametrize(
    ("count", "told"),
    [(3, ["devices", 3, "2 processes", 8, 12]), (10, ["devices", 10, 8, 12])],
)
def test_devices_that_hosts_cannot_share_equally_are_refused(count, told):
    with refuses(*told):
        pick_devices(hosts(8, 4), count)
