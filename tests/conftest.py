import atexit
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from lib import flags, runtime

# The scripts that tests start compute on the CPU, where resuming is bit-exact, whatever the machine has.
GPUS = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)      # the models are tiny: a second thread would only wait
os.environ["MASKGIT_CACHE"] = tempfile.mkdtemp(prefix="maskgit-tests-")
atexit.register(shutil.rmtree, os.environ["MASKGIT_CACHE"], ignore_errors=True)

EVERY_STEP = ["--save-every", 2, "--picture-every", 2, "--log-every", 1, "--bf16", "no"]
TINY_VQ = ["--filters", 8, "--codebook-size", 32, "--codebook-dim", 4, "--steps", 6, "--batch", 4, "--disc-width", 1,
           "--disc-max-width", 8, "--r1-every", 2, *EVERY_STEP]
TINY_TRANSFORMER = ["--cache-tokens", 0, "--dropout", 0.1, "--dim", 16, "--depth", 1, "--heads", 2, "--steps", 6,
                    "--batch", 4, "--class-dropout", 0, *EVERY_STEP]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """What is compared is compared in float32, also on a CPU that would compute in bfloat16."""
    monkeypatch.setattr(runtime, "computes_bfloat16", lambda: False)


def run(script, *arguments, code=0, env=None, **options):
    """Runs a script as a user would, but in float32 -> stdout + stderr. `code`: the exit status it must have."""
    if script != "pretrained.py" and "--bf16" not in arguments:
        arguments = (*arguments, "--bf16", "no")
    result = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True,
                            stdin=subprocess.DEVNULL, timeout=300, check=False,
                            env=(env or os.environ) | {"OMP_NUM_THREADS": "1"}, **options)
    output = result.stdout + result.stderr
    assert result.returncode == code, f"exit status {result.returncode}:\n{output}"
    if code == 2:
        assert "Traceback" not in output
    return output


def refused(script, *arguments, says, **options):
    """Runs a script that must end with status 2 and one line on stderr that holds each of the words `says`."""
    output = run(script, *arguments, code=2, **options)
    last = output.strip().splitlines()[-1]
    for word in [says] if isinstance(says, str) else says:
        assert word in last, f"'{word}' is not in: {last}"
    return last


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Calls a script's main() in this process (a new one takes seconds to start), in a folder -> what it printed.

    Where a code is expected, it must end with that: -> its last line on stderr."""
    def call(script, folder, *arguments, code=0):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            flags.command_line(script.main)
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        assert status == code, printed
        return printed.out if code == 0 else printed.err.strip().splitlines()[-1]
    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished toy run of both stages, made by the real scripts. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("trained") / "shapes"
    run("train_vq.py", "--run", folder, *TINY_VQ)
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER)
    return folder


def on_ranks(function, *arguments, world=2):
    """Calls function(*arguments) in processes that are set up as torchrun does it (world 1: as one alone).

    They are forked, which takes no time. Returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank):
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function(*arguments)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=[rank]) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()              # one that still runs has the status None
    return statuses
