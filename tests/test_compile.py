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


def train(script, ranks, *arguments):
    """Runs a training script in so many processes, and checks that it ends well."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"]
    command += [str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
    assert result.returncode == 0, result.stdout


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
