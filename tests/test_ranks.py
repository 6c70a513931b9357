"""Several processes (ranks): what they exchange, how they end, and how many there may be."""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY_TRANSFORMER,
    TINY_VQ,
    call_script,
    on_ranks,
    read_log,
    run,
    wait_for_step,
)
from torch import nn

from lib import devices, errors, runtime
from lib.loader import read_ahead
from lib.run import Run
from maskgit import MaskGIT, MaskGITConfig

CPU = Namespace(device="cpu", bf16=False)
# Entropy loss and codebook start look at whole batches: without them stage 1 is the same however a batch is split.
SPLITTABLE = [*TINY_VQ, "--codebook-lr", 1, "--entropy", 0, "--gan-start", 0.4, "--picture-every", 6]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=0, msg=name)


# ---- what ranks exchange

def gradients_by_micro_batch(machine):
    """Takes a step in two micro-batches, as the training scripts do. Returns the gradient after each."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    wrapped = machine.wrap(model)
    images = torch.arange(24.0).view(8, 3).chunk(machine.world)[machine.rank]
    first, last = images.chunk(2)
    with machine.micro_batch(wrapped, last=False):
        (wrapped(first).square().mean() / 2).backward()
    before = model.weight.grad.clone()
    with machine.micro_batch(wrapped, last=True):
        (wrapped(last).square().mean() / 2).backward()
    return before, model.weight.grad


def test_ranks_exchange_gradients_in_the_last_micro_batch_only(tmp_path):
    def on_a_rank():
        machine = runtime.Machine("cpu", bf16=False)
        torch.save(gradients_by_micro_batch(machine), tmp_path / f"{machine.rank}.pt")
        runtime.leave_ranks()
    assert on_ranks(on_a_rank) == [0, 0]
    _, alone = gradients_by_micro_batch(runtime.Machine("cpu", bf16=False))
    before_0, after_0 = torch.load(tmp_path / "0.pt")
    before_1, after_1 = torch.load(tmp_path / "1.pt")
    assert not torch.allclose(before_0, before_1)
    torch.testing.assert_close(after_0, after_1)
    torch.testing.assert_close(after_0, alone)


@pytest.mark.slow
def test_two_ranks_with_micro_batches_train_the_tokenizer_of_one(tmp_path):
    command = [*SPLITTABLE, "--steps", 4, "--save-every", 4, "--picture-every", 4]
    assert on_ranks(call_script, "train_vq", "--run", tmp_path / "1", *command, world=1) == [0]
    assert on_ranks(call_script, "train_vq", "--run", tmp_path / "2", *command, "--micro-batch", 1) == [0, 0]
    assert_same_training(tmp_path, "vqgan")


def test_two_ranks_with_micro_batches_train_the_transformer_of_one(untrained, tmp_path):
    """The autoregressive one, since the masks of the other are drawn on each rank for its own images."""
    command = [*TINY_TRANSFORMER, "--vqgan", untrained / "vqgan.pt", "--decoder", "autoregressive", "--dropout", 0,
               "--steps", 4, "--save-every", 4, "--picture-every", 4]
    assert on_ranks(call_script, "train_transformer", "--run", tmp_path / "1", *command, world=1) == [0]
    assert on_ranks(call_script, "train_transformer", "--run", tmp_path / "2", *command, "--micro-batch", 1) == [0, 0]
    assert_same_training(tmp_path, "autoregressive")


def assert_same_training(folder, stage):
    """The norm of the gradients counts as well, since the optimizers' steps do not depend on it."""
    assert_close(weights(folder / "1" / f"{stage}.pt"), weights(folder / "2" / f"{stage}.pt"))
    log = read_log(folder / "1" / f"{stage}.log.csv")
    for row, alone in zip(read_log(folder / "2" / f"{stage}.log.csv"), log, strict=True):
        assert float(row["gradient"]) == pytest.approx(float(alone["gradient"]), rel=1e-3)


def test_ranks_that_start_at_different_steps_end(trained, tmp_path, capfd):
    """As on two computers with a disk each, of which one holds the run."""
    shutil.copytree(trained, tmp_path / "1")

    def start(args, machine):
        args.run = tmp_path / str(machine.rank)
        Run("transformer", args, machine)
        machine.wait_for_ranks()
    args = Namespace(**vars(CPU), overwrite=False, resume=True)
    assert on_ranks(errors.command_line, lambda: runtime.launch(start, args)) == [2, 2]
    assert "one process starts at step 0, another at 6" in capfd.readouterr().err


# ---- torchrun

def torchrun(script, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",    # on a free port
            "--", str(ROOT / script), *map(str, arguments)]           # "--", or torchrun takes our --run for its own


def one_process(script, *arguments):
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def children_of(process):
    return subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Makes the run of one process with which others are compared."""
    folder = tmp_path_factory.mktemp("alone")
    assert on_ranks(call_script, "train_vq", "--run", folder, *SPLITTABLE, world=1) == [0]
    return folder


def train_until_killed_in_the_fourth_step(*command):
    original = runtime.Machine.seed_step

    def seed_step(machine, seed, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(machine, seed, step)
    runtime.Machine.seed_step = seed_step
    call_script(*command)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_moves_from_two_processes_to_one_and_back(first, then, alone, tmp_path):
    command = ["train_vq", "--run", tmp_path, *SPLITTABLE]
    statuses = on_ranks(train_until_killed_in_the_fourth_step, *command, world=first)
    assert 0 not in statuses and None not in statuses
    assert on_ranks(call_script, *command, "--resume", world=then) == [0] * then
    assert_close(weights(alone / "vqgan.pt"), weights(tmp_path / "vqgan.pt"))
    rows = read_log(tmp_path / "vqgan.log.csv")
    assert [row["step"] for row in rows] == list("123456")
    # The logged loss is the mean over the ranks: that of the whole batch.
    for row, expected in zip(rows, read_log(alone / "vqgan.log.csv"), strict=True):
        assert float(row["reconstruction"]) == pytest.approx(float(expected["reconstruction"]), abs=1e-3)


@pytest.mark.slow
def test_two_machines(alone, tmp_path):
    """Two agents with a process each, as on two machines with a shared folder, end with the weights of one process."""
    port = 27000 + os.getpid() % 1000
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1", "--",
               str(ROOT / "train_vq.py"), "--run", str(tmp_path), *map(str, SPLITTABLE)]
    agents = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
              for _ in range(2)]
    for agent in agents:
        output, _ = agent.communicate(timeout=600)
        assert agent.returncode == 0, output
    assert_close(weights(alone / "vqgan.pt"), weights(tmp_path / "vqgan.pt"))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    process = subprocess.Popen(torchrun("train_vq.py", "--run", tmp_path, *TINY_VQ, "--steps", 100000), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    wait_for_step(process, 2)
    os.kill(int(children_of(process)[-1]), signal.SIGKILL)
    started = time.time()
    process.communicate(timeout=60)
    assert process.returncode not in (0, None) and time.time() - started < 60


# ---- how ranks and readers end

class Zeros:
    """A data set whose reader processes go on for ever."""
    workers = 0

    def __getitem__(self, index):
        return torch.zeros(10)


def fail_beside_readers(error, failing_rank):
    """Reads with two workers, meets the other ranks at every step, and fails on one rank at step 3."""
    def loop(args, machine):
        if machine.world > 1:
            threading.Thread(target=threading.Event().wait).start()     # never ends, as NCCL's may not
        stream = iter(read_ahead(Zeros(), range(10_000), workers=2))
        for step in range(1000):
            next(stream)
            if step == 3 and machine.rank == failing_rank:
                raise error
            machine.true_on_any_rank(False)

    def main():
        runtime.launch(loop, CPU)
    errors.command_line(main)


ERRORS = [
    (errors.UserError("the disk is full: free some space"), 2, "error: the disk is full: free some space\n"),
    (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug\n"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
]


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("error, status, message", ERRORS)
def test_an_error_on_one_rank_ends_all(error, status, message, failing_rank, capfd):
    started = time.time()
    statuses = on_ranks(fail_beside_readers, error, failing_rank)
    assert time.time() - started < 30
    assert statuses[failing_rank] == status
    assert statuses[1 - failing_rank] == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert "another process of this run has ended" in printed


@pytest.mark.parametrize("error, status, message", ERRORS)
def test_an_error_beside_readers_ends_one_process(error, status, message, capfd):
    started = time.time()
    assert on_ranks(fail_beside_readers, error, 0, world=1) == [status]
    assert time.time() - started < 30
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_that_all_ranks_agree_on_ends_the_readers(world):
    """A run that a signal stops ends in this way."""
    started = time.time()
    assert on_ranks(stop_beside_readers, world=world) == [143] * world
    assert time.time() - started < 30


def stop_beside_readers():
    def loop(args, machine):
        stream = iter(read_ahead(Zeros(), range(10_000), workers=2))
        next(stream)
        sys.exit(143)

    def main():
        runtime.launch(loop, CPU)
    errors.command_line(main)


@pytest.mark.slow
def test_a_killed_run_goes_on_while_its_readers_still_live(tmp_path):
    """They end within five seconds, and must not keep the lock of the run's folder until then."""
    command = ["train_vq.py", "--run", tmp_path, *TINY_VQ, "--workers", 2, "--steps"]
    process = subprocess.Popen(one_process(*command, 100000), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for_step(process, 3)
    process.kill()
    process.wait()
    assert "wrote" in run(*command, 200, "--resume")


@pytest.mark.parametrize("ending", [SystemExit(143), None])
def test_ranks_leave_together_after_a_signal_and_at_the_end(ending):
    """Otherwise NCCL complains at exit, and gloo's threads may abort the process."""
    def on_a_rank():
        def loop(args, machine):
            assert torch.distributed.is_initialized()
            if ending:
                raise ending
        try:
            runtime.launch(loop, CPU)
        finally:
            assert not torch.distributed.is_initialized()
    assert on_ranks(on_a_rank) == ([143, 143] if ending else [0, 0])


# ---- how many ranks, and where

def test_readers_are_shared_among_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(192), raising=False)
    assert runtime.cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert runtime.cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "400")
    assert runtime.cores() == 1


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(errors.UserError, match="process 2 has no GPU of its own.*--nproc_per_node"):
        runtime.Machine("cuda")


@pytest.mark.parametrize(("capability", "compiler", "bf16", "compiled"), [
    ((6, 1), "gcc", False, False), ((7, 5), "gcc", False, True), ((8, 0), None, True, False), ((8, 0), "gcc", True, True),
])
def test_a_gpu_that_cannot_do_it_has_other_defaults(capability, compiler, bf16, compiled, monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: compiler if name == compiler else None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for name, value in {"is_available": True, "device_count": 1, "set_device": None, "get_device_capability": capability,
                        "get_device_properties": Namespace(major=capability[0])}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine = runtime.Machine("cuda")
    assert (machine.bf16, machine.compiled) == (bf16, compiled)
    notes = capsys.readouterr().err
    assert ("bfloat16" in notes) != bf16 and ("torch.compile" in notes) != compiled
    machine = runtime.Machine("cuda", bf16=True, compiled=True)
    assert machine.bf16 and machine.compiled and not capsys.readouterr().err


@pytest.fixture
def gpu_without_cuda(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(runtime.Path, "exists", lambda path: str(path) == "/proc/driver/nvidia")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("cuda, reason", [(None, "a build for CPUs"), ("13.0", "CUDA 13.0 needs a newer driver")])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_named(name, cuda, reason, gpu_without_cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(errors.UserError, match=f"{reason}.*--device cpu"):
        runtime.Machine(name)
    assert runtime.Machine("cpu").device.type == "cpu"


def test_a_gpu_that_is_hidden_is_not_asked_for(gpu_without_cuda, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime.Machine("auto").device.type == "cpu"


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.Machine("auto").device.type == "cpu"
    with pytest.raises(errors.UserError, match="NVIDIA.*--device cpu"):
        runtime.Machine("cuda")


def test_torch_xla_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(errors.UserError, match="torch-xla.*pip install"):
        runtime.Machine("xla")


def test_upsampling_for_torch_xla_gives_the_same_pixels():
    """torch-xla's own has no backward pass."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2), nn.Sequential(nn.Upsample(scale_factor=2)))
    images = torch.rand(2, 3, 5, 7)
    expected = model(images)
    runtime.replace_upsampling(model)
    assert not any(isinstance(module, nn.Upsample) for module in model.modules())
    assert torch.equal(model(images), expected)


def test_blocks_prepared_for_a_cpu_compute_the_same():
    """Inductor is left out: the compiled block is the one that a compiler gets."""
    torch.manual_seed(0)
    model = MaskGIT(MaskGITConfig(codebook_size=16, num_classes=2, num_tokens=9, dim=16, depth=2, heads=2, mlp_dim=32))
    model.eval()
    tokens, labels = torch.randint(16, (3, 9)), torch.tensor([0, 1, 0])
    expected = model(tokens, labels)
    for block in model.blocks:
        devices.replace_gelu(block)
    assert not any(isinstance(module, nn.GELU) for module in model.blocks.modules())
    assert torch.allclose(model(tokens, labels), expected, atol=1e-6)
    seen = []
    for block in model.blocks:
        block.attention.query.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    runtime.Machine("cpu", bf16=True).wrap(model, model.blocks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(tokens, labels).float(), expected, atol=0.05)
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize(("compiled", "steps", "expected"), [
    (None, 999, False), (None, 1000, True), (False, 1000, False), (True, 0, True),
])
def test_blocks_are_compiled_in_long_trainings(compiled, steps, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: f"/usr/bin/{name}")
    machine = runtime.Machine("cpu", bf16=False, compiled=compiled, training_steps=steps)
    assert machine.compiles_blocks == expected
    model = MaskGIT(MaskGITConfig(codebook_size=16, num_classes=2, num_tokens=9, dim=16, depth=2, heads=2, mlp_dim=32))
    machine.wrap(model, model.blocks)
    assert all((block._compiled_call_impl is not None) == expected for block in model.blocks)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert runtime.Machine("cpu", compiled=compiled, training_steps=steps).compiles_blocks == (compiled is True)
