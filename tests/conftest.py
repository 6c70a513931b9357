import atexit
import csv
import functools
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lib.run
import train_transformer
import train_vq
from lib import data, errors, files, runtime
from lib.shapes import Shapes
from maskgit import MaskGIT, MaskGITConfig
from sequential import CausalTransformer
from vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).parent.parent

# The tests compute on the CPU, where resuming is bit-exact, even if there is a GPU; only test_cuda.py uses that.
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

torch.set_num_threads(1)      # the models are tiny: a second thread would only wait
os.environ["MASKGIT_CACHE"] = tempfile.mkdtemp(prefix="maskgit-tests-")
atexit.register(shutil.rmtree, os.environ["MASKGIT_CACHE"], ignore_errors=True)

EVERY_STEP = ["--save-every", 2, "--picture-every", 4, "--log-every", 1, "--bf16", "no"]
TINY_VQ = ["--filters", 8, "--codebook-size", 32, "--codebook-dim", 4, "--steps", 6, "--batch", 4, "--disc-width", 1,
           "--disc-max-width", 8, "--r1-every", 2, *EVERY_STEP]
TINY_TRANSFORMER = ["--cache-tokens", 0, "--dropout", 0.1, "--dim", 16, "--depth", 1, "--heads", 2, "--steps", 6,
                    "--batch", 4, "--class-dropout", 0, *EVERY_STEP]


# Trainings in this process and its forks are spared what takes longest: curves, for which they copy the log, and three
# quarters of the validation images.

def copy_log(path, log):
    shutil.copy(log, path)


def evenly_spaced_but_fewer(images, count):
    return data.evenly_spaced(images, min(count, 128))


for script in (train_vq, train_transformer):
    script.draw_log = copy_log
    script.evenly_spaced = evenly_spaced_but_fewer


def pytest_collection_finish():
    gc.freeze()         # what is imported by now need not be searched for garbage again and again


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """Makes all tests compute in float32, even on a CPU with bfloat16 instructions."""
    monkeypatch.setattr(runtime, "computes_bfloat16", lambda: False)


def run(script, *arguments, code=0, env=None, **options):
    """Runs a script as a user would, but in float32. Returns stdout + stderr. code: the exit status it must have."""
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
    """Runs a script that must end with status 2 and a line on stderr that holds each of the words `says`. Returns it."""
    output = run(script, *arguments, code=2, **options)
    last = output.strip().splitlines()[-1]
    for word in [says] if isinstance(says, str) else says:
        assert word in last, f"'{word}' is not in: {last}"
    return last


def rand_of(seed):
    """Returns torch.rand with a generator of its own."""
    return functools.partial(torch.rand, generator=torch.Generator().manual_seed(seed))


def wait_for_step(process, step):
    """Reads a training's stdout until it has logged a step."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def read_log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_log(path, expected_path, rows, rel, absolute):
    """Compares two logs of so many rows: all values but the speed, within the tolerances of pytest.approx."""
    found = read_log(path)
    expected_rows = read_log(expected_path)
    assert len(found) == len(expected_rows) == rows
    for row, expected in zip(found, expected_rows, strict=True):
        for name in expected.keys() - {"images/s", "TFLOP/s"}:
            if row[name] != expected[name]:                                          # empty where nothing is measured
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=rel, abs=absolute), (name, row["step"])


@pytest.fixture(autouse=True)
def signal_handlers():
    """Puts back what a training in this process does with Ctrl-C and SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Returns a function that calls a script's main() in this process, since a new one takes seconds to start.

    It returns what main() prints; or, if it must end with a `code`, what it prints on stderr."""
    def call(script, folder, *arguments, code=0):
        at_exit = []
        atexit_of_run = SimpleNamespace(register=lambda function, *given: at_exit.append((function, given)))
        monkeypatch.setattr(lib.run, "atexit", atexit_of_run)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            errors.command_line(script.main)
        except SystemExit as end:
            status = end.code
        for function, given in at_exit:         # a run gives its folder free when the process ends
            function(*given)
        printed = capsys.readouterr()
        assert status == code, printed
        return printed.out if code == 0 else printed.err.strip()
    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Makes a toy run of both stages by the real scripts. A test that changes it must copy it first."""
    folder = tmp_path_factory.mktemp("trained") / "shapes"
    assert on_ranks(call_script, "train_vq", "--run", folder, *TINY_VQ, world=1) == [0]
    assert on_ranks(call_script, "train_transformer", "--run", folder, *TINY_TRANSFORMER, world=1) == [0]
    return folder


def call_script(name, *arguments):
    """Calls a script's main() as its command line would."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    errors.command_line(importlib.import_module(name).main)


def on_ranks(function, *arguments, world=2):
    """Calls function(*arguments) in forked processes, which start at once. Returns their exit statuses.

    world: how many. Several are set up as torchrun does it. A process that hangs has the status None."""
    import torch._dynamo  # noqa: F401 (every optimizer imports it: here once, and not in each process)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank):
        gc.freeze()
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        function(*arguments)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=[rank]) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A run as `trained`, but made in a moment: what it draws is noise, and each code looks different. Not to be changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained") / "shapes"
    tokenizer = VQGAN(VQGANConfig(32, 4, filters=8, multipliers=(1, 1, 2), res_blocks=1, groups=2)).eval()
    transformer = MaskGIT(MaskGITConfig(32, 10, 64, dim=16, depth=1, heads=2, mlp_dim=64)).eval()
    sequential = CausalTransformer(transformer.config).eval()
    models = {"vqgan": tokenizer, "transformer": transformer, "autoregressive": sequential}
    for model in models.values():
        for parameter in model.parameters():        # far from where training starts, so that predictions differ
            parameter.data += 0.3 * torch.randn_like(parameter)
    about = {"step": 0, "settings": {}, "data": "shapes", "image_size": 32, "classes": list(Shapes("val").classes)}
    for stage, model in models.items():
        checkpoint = {"kind": stage, "config": asdict(model.config), "model": model.state_dict(), **about}
        if stage != "vqgan":
            checkpoint["tokenizer"] = files.fingerprint(tokenizer)
        files.save_checkpoint(folder / f"{stage}.pt", checkpoint)
    return folder
