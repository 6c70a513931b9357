"""On a machine with GPUs: both stages for a few steps, compiled and not, then resumed, drawn from and measured."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, VISIBLE_GPUS

ENVIRONMENT = os.environ.copy()
del ENVIRONMENT["CUDA_VISIBLE_DEVICES"]
if VISIBLE_GPUS is not None:
    ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS


def count_gpus():
    """Asks another process, so that this one never starts CUDA."""
    script = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.check_output([sys.executable, "-c", script], env=ENVIRONMENT, text=True))


NUM_GPUS = count_gpus() if Path("/dev/nvidia0").exists() else 0
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NUM_GPUS == 0, reason="there is no NVIDIA GPU that torch can use")]

# A real run has GroupNorm, channels last and bfloat16; the flags of the other tests hide them.
STAGE1 = [*TINY_VQ, "--groups", 2, "--bf16", "yes"]
STAGE2 = [*TINY_TRANSFORMER, "--bf16", "yes"]


def on_gpu(script, *arguments, processes=1, code=0):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    command += [str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT)
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    return output


@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_both_stages(compiled, tmp_path):
    folder = tmp_path / "shapes"
    flags = ["--run", folder, "--compile", compiled]
    output = on_gpu("train_vq.py", *flags, *STAGE1, "--gan-start", 0)       # the discriminator and R1 from step 1
    assert "on cuda" in output
    on_gpu("train_transformer.py", *flags, *STAGE2, "--evaluate-every", 3, "--evaluate-num", 100,
           "--classifier-steps", 5)
    on_gpu("train_transformer.py", *flags, *STAGE2, "--resume")
    on_gpu("sample.py", "--run", folder)
    on_gpu("evaluate.py", "--run", folder, "--num", 100, "--classifier-steps", 5)


@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_bench(compiled):
    on_gpu("bench.py", "--preset", "shapes", "--batch", 2, 3, "--repeats", 1, "--compile", compiled)


@pytest.mark.skipif(NUM_GPUS < 2, reason="there is but one GPU")
def test_two_ranks(tmp_path):
    folder = tmp_path / "shapes"
    on_gpu("train_vq.py", "--run", folder, *STAGE1, processes=2)
    on_gpu("train_transformer.py", "--run", folder, *STAGE2, "--cache-tokens", 1, "--micro-batch", 1, "--evaluate-every", 3,
           "--evaluate-num", 100, "--classifier-steps", 5, processes=2)


def test_one_rank_too_many_says_so(tmp_path):
    ranks = NUM_GPUS + 1
    output = on_gpu("train_vq.py", "--run", tmp_path / "run", *STAGE1, "--batch", 4 * ranks, processes=ranks, code=1)
    assert "has no GPU of its own" in output
