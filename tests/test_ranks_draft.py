"""Several ranks: what they exchange, and how one of them ends."""
import multiprocessing
import os
import socket
import time
from argparse import Namespace

import pytest
import torch
from torch import nn

from lib import flags, runtime
from lib.data import loader
from conftest import on_ranks

CPU = Namespace(device="cpu", bf16=False)


# ---- gradients

def gradients_by_micro_batch(machine):
    """Takes one step in two micro-batches. Returns the gradient after each."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    wrapped = machine.wrap(model)
    images = torch.arange(24.0).view(8, 3).chunk(machine.world)[machine.rank]
    half = len(images) // 2
    found = []
    for part in (images[:half], images[half:]):
        with machine.exchange_gradients(wrapped, last=len(found) == 1):
            (wrapped(part).square().mean() / 2).backward()
        found.append(model.weight.grad.clone())
    return found


def test_ranks_exchange_gradients_in_the_last_micro_batch_alone(tmp_path):
    def rank():
        machine = runtime.Machine("cpu", bf16=False)
        torch.save(gradients_by_micro_batch(machine), tmp_path / f"{machine.rank}.pt")
        runtime.leave_ranks()
    assert on_ranks(rank) == [0, 0]
    ours = gradients_by_micro_batch(runtime.Machine("cpu", bf16=False))
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert not torch.allclose(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(first[1], ours[1])


# ---- endings

class Zeros:
    """A data set whose readers go on for ever."""
    workers = 0

    def __getitem__(self, index):
        return torch.zeros(10)


def fail_beside_readers(error, failing_rank):
    """Trains, so to say: reads with two workers, meets the other ranks, and fails on one rank at step 3."""
    def loop(args, machine):
        stream = iter(loader(Zeros(), range(10_000), Zeros, workers=2))
        for step in range(1000):
            next(stream)
            if step == 3 and machine.rank == failing_rank:
                raise error
            machine.any(False)
    flags.command_line(lambda: runtime.launch(loop, CPU))


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("error, status, message", [
    (flags.UserError("the disk is full: free some space"), 2, "error: the disk is full: free some space\n"),
    (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug\n"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
])
def test_an_error_on_one_rank_ends_all(error, status, message, failing_rank, capfd):
    started = time.time()
    statuses = on_ranks(fail_beside_readers, error, failing_rank)
    assert time.time() - started < 10
    assert statuses[failing_rank] == status
    assert statuses[1 - failing_rank] != 0
    printed = capfd.readouterr().err
    assert message in printed
    assert "another process of this run has ended" in printed


@pytest.mark.parametrize("error, status", [(flags.UserError("bad"), 2), (ZeroDivisionError("a bug"), 1)])
def test_an_error_beside_readers_ends_one_process(error, status, capfd):
    started = time.time()
    assert on_ranks(fail_beside_readers, error, 0, world=1) == [status]
    assert time.time() - started < 10
    assert str(error) in capfd.readouterr().err


@pytest.mark.parametrize("ending", [SystemExit(143), None])
def test_ranks_leave_together_after_a_signal_and_at_the_end(ending):
    """Without that, NCCL complains at exit, and gloo's threads may abort the process."""
    def rank():
        def loop(args, machine):
            assert torch.distributed.is_initialized()
            if ending:
                raise ending
        try:
            runtime.launch(loop, CPU)
        finally:
            assert not torch.distributed.is_initialized()
    assert on_ranks(rank) == ([143, 143] if ending else [0, 0])
