"""torch.compile, the default on a GPU, here through Inductor on the CPU: compiled trainings log the same losses."""
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    TINY_TRANSFORMER,
    TINY_VQ,
    assert_same_log,
    call_script,
    on_ranks,
    read_log,
)
from torch._dynamo.utils import counters

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")]

STEPS = ["--steps", 4, "--save-every", 100, "--picture-every", 100]
# The discriminator from the first step on, and R1 at every second one.
STAGE_1 = [*TINY_VQ, "--image-size", 8, "--multipliers", 1, 1, "--gan-start", 0, "--gan-ramp", 2, "--r1-every", 2, *STEPS]
# Without dropout, which a compiled model draws in another order.
STAGE_2 = [*TINY_TRANSFORMER, "--dropout", 0, *STEPS]


def train_compiled(*command):
    counters.clear()
    call_script(*command, "--compile", "yes")
    assert counters["frames"]["ok"]                                         # an error of the compiler is but a warning


@pytest.mark.parametrize("ranks, backend", [(1, "inductor"), (2, "aot_eager")])
def test_compiled_trainings_have_the_losses_of_plain_ones(ranks, backend, tmp_path, monkeypatch):
    """The graphs of two ranks are split for the exchange of gradients; their kernels are no others than those of one."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = tmp_path / "plain"
    compiled = tmp_path / "compiled"
    ended_well = [0] * ranks
    assert on_ranks(call_script, "train_vq", "--run", plain, *STAGE_1, world=ranks) == ended_well
    assert on_ranks(train_compiled, "train_vq", "--run", compiled, *STAGE_1, world=ranks) == ended_well
    assert_same_log(compiled / "vqgan.log.csv", plain / "vqgan.log.csv", 4, 1e-2, 1e-3)
    assert all(float(row["discriminator"]) > 0 for row in read_log(compiled / "vqgan.log.csv"))
    stage_2 = [*STAGE_2, "--vqgan", plain / "vqgan.pt"]
    assert on_ranks(call_script, "train_transformer", "--run", plain, *stage_2, world=ranks) == ended_well
    assert on_ranks(train_compiled, "train_transformer", "--run", compiled, *stage_2, "--overwrite",
                    world=ranks) == ended_well
    assert_same_log(compiled / "transformer.log.csv", plain / "transformer.log.csv", 4, 1e-2, 1e-3)


# In stage 1 the discriminator joins in at once, with one program for n images and one for 2n. In stage 2 each step encodes
# 20 images, 10 at a time, and validation encodes 512, of which the last two are a tail.
@pytest.mark.parametrize("script, flags", [
    ("train_vq.py", STAGE_1),
    ("train_transformer.py", [*STAGE_2, "--depth", 2, "--batch", 20, "--micro-batch", 10])])
def test_nothing_is_compiled_after_the_second_step_or_for_any_shape(script, flags, untrained, tmp_path):
    if script == "train_transformer.py":
        flags = [*flags, "--vqgan", untrained / "vqgan.pt"]
    command = [ROOT / script, "--run", tmp_path / "run", *flags, "--picture-every", 2, "--compile", "yes"]
    settings = {"TORCH_LOGS": "dynamic,dynamo", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | settings, timeout=900, check=False)
    output = result.stdout
    assert result.returncode == 0, output
    before, after = output.split("step 2/4")
    assert "torchdynamo start" in before and "torchdynamo start" not in after
    assert "create_symbol" not in output                    # of a dynamic size
