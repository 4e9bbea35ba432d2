"""Ctrl-C ends commands in one line, wherever it finds them, with nothing half-written; and a user's script at once.

Every test sends SIGINT to a process that has reached a certain place and would stay there for minutes, in C, where Python does not
run handlers of signals.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import receiving_interrupts

from distrijax import DEFAULT_MODEL, interrupts

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow
LONG = 300  # seconds for what a loaded machine should have reached by then
SOON = 20  # seconds in which a loaded machine should have ended what takes 0.3 s elsewhere

STAY = """
import hashlib, importlib.abc, pathlib, sys

def stay(*_, **__):
    pathlib.Path("reached").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
"""Several minutes in C, without Python's lock."""
IMPORTING = """
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "jax":
            stay()

sys.meta_path.insert(0, Finder())
"""
COMMANDS = {
    "generate": ["examples/generate.py"],
    "evaluate": ["examples/evaluate.py"],
    "latency": ["benchmarks/latency.py"],
    "convert": ["-m", "distrijax.convert"],
    "plan": ["-m", "distrijax.plan"],
}


def start(folder: Path, *arguments: str | Path, before: str = "") -> subprocess.Popen:
    """A Python that runs `before` before all else, receives SIGINT, and has been waited for until it says that it is there."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(STAY + before)
    folder = folder / "work"
    folder.mkdir()
    path = os.pathsep.join(map(str, (folder.parent / "site", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with receiving_interrupts():
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, env=environment, **pipes)
    wait_for(folder / "reached", process)
    return process


def wait_for(file: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + LONG
    while not file.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"never came to {file.name}: {process.communicate()}")
        time.sleep(0.02)
    file.unlink()


def pressed(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and stderr after one Ctrl-C."""
    process.send_signal(signal.SIGINT)
    _, err = printed(process)
    return process.returncode, err


def printed(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed on stdout and stderr, once it has ended."""
    with process:  # closes its pipes
        try:
            return process.communicate(timeout=SOON)
        finally:
            process.kill()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_imports_is_ended(tmp_path, name):
    arguments = [ROOT / each if each.endswith(".py") else each for each in COMMANDS[name]]
    assert pressed(start(tmp_path, *arguments, before=IMPORTING)) == (130, "interrupted\n")


PLACES = {
    "loading": "import distrijax.pipelines.build as module; module.read_components = stay",
    "compiling": "import distrijax.parallel.programs as module; module.compiled = stay",
    "denoising": "import distrijax.parallel.threads as module; import jax; module.jax.block_until_ready = stay",
    "saving": """
import PIL.Image
save = PIL.Image.Image.save

def write_and_stay(self, file, *rest, **options):
    save(self, file, *rest, **options)
    stay()

PIL.Image.Image.save = write_and_stay
""",
}


@pytest.mark.parametrize("place", ["compiling", *(pytest.param(p, marks=slow) for p in PLACES if p != "compiling")])
def test_generate_is_ended_and_leaves_nothing(tmp_path, place):
    script = (
        f"from distrijax.cli import start\nstart.begin(several=True)\n{PLACES[place]}\n"
        "start.run('distrijax.cli.generate', several=True)"
    )
    flags = ["--devices", "1", "--image-size", "64", "--num-inference-steps", "1"]
    running = start(tmp_path, "-c", f"from sitecustomize import stay\n{script}", *flags)
    assert pressed(running) == (130, "interrupted\n")
    assert {path.name for path in (tmp_path / "work").iterdir()} <= {"reached"}  # several threads compile


@slow
@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_waits_for_the_others_is_ended(tmp_path, process_id):
    """`stay` says that it is there, and is called right before; it waits for half a minute."""
    script = (
        "from sitecustomize import pathlib\nfrom distrijax.cli import start\nstart.begin(several=True)\n"
        "import jax\ninitialize = jax.distributed.initialize\n"
        "def join(*rest, **options):\n    pathlib.Path('reached').touch()\n    initialize(*rest, **options)\n"
        "jax.distributed.initialize = join\nstart.run('distrijax.cli.generate', several=True)"
    )
    flags = ["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "1"]
    if process_id == 0:
        flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "0"]
    assert pressed(start(tmp_path, "-c", script, *flags)) == (130, "interrupted\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@slow
@pytest.mark.parametrize("force", [False, True], ids=["new", "in the place of another"])
def test_convert_leaves_what_was_there(tmp_path, force):
    """It is caught between writing the new file and giving it its name, the old one being out of the way."""
    script = (
        "from sitecustomize import stay\nfrom distrijax.interrupts import end_on_interrupt\nend_on_interrupt()\n"
        "import pathlib, sys, runpy\nimport distrijax.atomic_write as module\n"
        "module._sync = stay\nfrom distrijax.convert.__main__ import main\n"
        "main(sys.argv[1:])"
    )
    out = tmp_path / "work" / "out"
    flags = [DEFAULT_MODEL, out]
    if force:
        script = script.replace("_sync = stay", "_sync = lambda path: None\npathlib.Path.replace = stay")
        script = script.replace(
            "main(sys", "out = pathlib.Path(sys.argv[2])\nout.mkdir()\n(out / 'old').touch()\nmain(sys"
        )
        flags.append("--force")
    assert pressed(start(tmp_path, "-c", script, *flags)) == (130, "interrupted\n")
    assert [path.name for path in out.parent.rglob("*")] == (["out", "old"] if force else [])


def test_a_second_press_does_not_wait_for_what_is_undone(tmp_path):
    script = (
        "from sitecustomize import stay\nfrom distrijax import interrupts\ninterrupts.PATIENCE = 600\n"
        "interrupts.end_on_interrupt()\nwith interrupts.undone(stay):\n    stay()"
    )
    running = start(tmp_path, "-c", script)
    running.send_signal(signal.SIGINT)
    wait_for(tmp_path / "work" / "reached", running)
    running.send_signal(signal.SIGINT)  # as one that a launcher hands on: the same press
    time.sleep(2 * interrupts.AGAIN)
    assert running.poll() is None
    assert pressed(running) == (130, "interrupted\n")


def test_a_command_in_the_background_of_a_script_ignores_ctrl_c_as_all_do_there(tmp_path):
    script = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom distrijax.interrupts import end_on_interrupt\n"
        "end_on_interrupt()\nimport pathlib, time\npathlib.Path('reached').touch()\ntime.sleep(1)"
    )
    assert pressed(start(tmp_path, "-c", script)) == (0, "")


PROGRAMS = """
from sitecustomize import stay
import jax, numpy as np, pathlib, time
from distrijax.parallel import programs, threads

def array():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(np.ones((64, 64), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
"""
SCRIPTS = {
    "joining others": """
from distrijax.parallel import processes
initialize = jax.distributed.initialize
def join(*rest, **options):
    pathlib.Path("reached").touch()
    initialize(*rest, **options)
jax.distributed.initialize = join
processes.initialize("127.0.0.1:1", 2, 1, timeout=300)
""",
    "compiling": "programs.compiled = stay\nprograms.Programs('cpu')(programs.Stage(lambda *each: each[-1]), None, (), array())",
    "running": """
def endless(static, params, x):
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: (x @ x).clip(1, 1), x)

launch = programs._launches.__class__.__call__
def told(*arguments, **options):
    pathlib.Path("reached").touch()
    return launch(*arguments, **options)
programs._launches.__class__.__call__ = told
programs.Programs("cpu")(programs.Stage(endless), None, (), array())
""",
}


@pytest.mark.parametrize("place", SCRIPTS)
def test_a_users_script_is_interrupted_and_ends(tmp_path, place):
    """As Python ends one: by the signal itself, after a traceback; what was registered with `atexit` since is called."""
    script = f"{PROGRAMS}\nimport atexit\natexit.register(print, 'farewell')\n{SCRIPTS[place]}"
    running = start(tmp_path, "-c", script)
    time.sleep(0.5)  # a program that runs says so before it is handed over
    running.send_signal(signal.SIGINT)
    out, err = printed(running)
    assert running.returncode == -signal.SIGINT
    assert (out, err.splitlines()[-1]) == ("farewell\n", "KeyboardInterrupt")


def test_a_users_script_that_goes_on_waits_for_its_threads_until_the_next_press(tmp_path):
    script = (
        f"{PROGRAMS}\ntry:\n    threads.interruptible(stay)\nexcept KeyboardInterrupt:\n"
        "    print('caught', flush=True)\n    pathlib.Path('reached').touch()\n"
    )
    running = start(tmp_path, "-c", script)
    running.send_signal(signal.SIGINT)
    wait_for(tmp_path / "work" / "reached", running)
    time.sleep(1)
    assert running.poll() is None
    assert pressed(running) == (-signal.SIGINT, "")


def test_an_interrupt_that_falls_into_a_callback_of_the_garbage_collector_is_not_lost():
    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            raise KeyboardInterrupt

    @interrupts.not_lost()
    def collect_and_wait():
        gc.collect()
        time.sleep(10)

    gc.collect()  # what other tests left
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_and_wait()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_other_exceptions_there_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Broken:
        def __del__(self):
            raise RuntimeError

    with interrupts.not_lost():
        Broken()
    Broken()
    assert told == [RuntimeError, RuntimeError]
