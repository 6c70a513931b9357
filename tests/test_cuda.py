"""On a machine with GPUs: both stages a few steps, compiled and not, then resumed, drawn from and measured."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GPUS, ROOT, TINY_TRANSFORMER, TINY_VQ

pytestmark = pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no NVIDIA GPU")
# GroupNorm, channels last and bfloat16 are what a real run has; the tests' other flags hide them.
STAGE1 = [*TINY_VQ, "--groups", 2, "--bf16", "yes"]
STAGE2 = [*TINY_TRANSFORMER, "--bf16", "yes"]


def on_gpu(script, *arguments, processes=1, code=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | GPUS
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_both_stages(compiled, tmp_path):
    folder, flags = tmp_path / "shapes", ["--run", tmp_path / "shapes", "--compile", compiled]
    assert "on cuda" in on_gpu("train_vq.py", *flags, *STAGE1)
    on_gpu("train_transformer.py", *flags, *STAGE2, "--evaluate-every", 3, "--evaluate-num", 100,
           "--classifier-steps", 5)
    on_gpu("train_transformer.py", *flags, *STAGE2, "--resume")
    on_gpu("sample.py", "--run", folder)
    on_gpu("evaluate.py", "--run", folder, "--num", 100, "--classifier-steps", 5)
    on_gpu("bench.py", "--preset", "shapes", "--batch", 2, 3, "--repeats", 1, "--compile", compiled)


def test_as_many_ranks_as_gpus(tmp_path):
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if count > 1:
        on_gpu("train_vq.py", "--run", tmp_path / "run", *STAGE1, processes=2)
    # One too many says so in a line.
    output = on_gpu("train_vq.py", "--run", tmp_path / "many", *STAGE1, "--batch", 4 * (count + 1),
                    processes=count + 1, code=1)
    assert "has no GPU of its own" in output
