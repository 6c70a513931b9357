"""torch.compile, the default on a GPU, here through Inductor on the CPU: compiled trainings log the same losses."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, read_log

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")]

STEPS = ["--steps", 4, "--save-every", 100, "--picture-every", 100]
# The discriminator from the first step on, and R1 at every second one.
STAGE_1 = [*TINY_VQ, "--multipliers", 1, 1, "--gan-start", 0, "--gan-ramp", 2, "--r1-every", 2, *STEPS]
# Without dropout, which a compiled model draws in another order.
STAGE_2 = [*TINY_TRANSFORMER, "--dropout", 0, *STEPS]


def train(script, ranks, *arguments, **environment):
    """Runs a training script in so many processes, and checks that it ends well. Returns its output."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"]
    command += [str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                            env=os.environ | {"OMP_NUM_THREADS": "1", **environment}, timeout=900)
    assert result.returncode == 0, result.stdout
    return result.stdout


def assert_same_losses(path, expected_path):
    """Compares two logs: the losses of every step, and the figures of the last one."""
    rows = read_log(path)
    expected_rows = read_log(expected_path)
    assert len(rows) == len(expected_rows) == 4
    for row, expected in zip(rows, expected_rows, strict=True):
        for name in expected.keys() - {"images/s", "TFLOP/s"}:
            if row[name] != expected[name]:                                          # empty where nothing is measured
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-2, abs=1e-3), (name, row["step"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_trainings_have_the_losses_of_plain_ones(ranks, tmp_path):
    plain = tmp_path / "plain"
    compiled = tmp_path / "compiled"
    train("train_vq.py", ranks, "--run", plain, *STAGE_1, "--compile", "no")
    train("train_vq.py", ranks, "--run", compiled, *STAGE_1, "--compile", "yes")
    assert_same_losses(compiled / "vqgan.log.csv", plain / "vqgan.log.csv")
    assert all(float(row["discriminator"]) > 0 for row in read_log(compiled / "vqgan.log.csv"))
    tokenizer = ["--vqgan", plain / "vqgan.pt"]
    train("train_transformer.py", ranks, "--run", plain, *STAGE_2, "--compile", "no")
    train("train_transformer.py", ranks, "--run", compiled, *tokenizer, "--overwrite", *STAGE_2, "--compile", "yes")
    assert_same_losses(compiled / "transformer.log.csv", plain / "transformer.log.csv")


# In stage 1 the discriminator joins in at once, with one program for n images and one for 2n. In stage 2 each step encodes
# 20 images, 10 at a time, and validation encodes 512, of which the last two are a tail.
@pytest.mark.parametrize("script, flags", [
    ("train_vq.py", STAGE_1),
    ("train_transformer.py", [*STAGE_2, "--depth", 2, "--batch", 20, "--micro-batch", 10])])
def test_nothing_is_compiled_after_the_second_step_or_for_any_shape(script, flags, untrained, tmp_path):
    if script == "train_transformer.py":
        flags = [*flags, "--vqgan", untrained / "vqgan.pt"]
    output = train(script, 1, "--run", tmp_path / "run", *flags, "--picture-every", 2, "--compile", "yes",
                   TORCH_LOGS="dynamic,dynamo", PYTHONUNBUFFERED="1")
    before, after = output.split("step 2/4")
    assert "torchdynamo start" in before and "torchdynamo start" not in after
    assert "create_symbol" not in output                    # of a dynamic size
