"""torch-xla, on its CPU device as if that were 1, 2 and 8 chips: the numbers of plain CPU, and few compilations.

    pip install torch==2.9.0 torch_xla==2.9.0 numpy pillow matplotlib pytest
    python -m pytest -m '' tests/test_xla.py
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, assert_same_log, run

from lib.pictures import save_image, to_pil
from lib.shapes import SHAPES, Shapes

pytest.importorskip("torch_xla")
pytestmark = pytest.mark.slow

# R1 at every step: a step with it and one without are two programs. No dropout: the device draws its own numbers.
VQ = ["--image-size", 16, "--multipliers", 1, 1, "--filters", 8, "--codebook-size", 32, "--codebook-dim", 4,
      "--disc-width", 1, "--disc-max-width", 8, "--gan-start", 0, "--r1-every", 1, "--seed", 1]
TRANSFORMER = ["--cache-tokens", 0, "--dropout", 0, "--dim", 16, "--depth", 1, "--heads", 2]
# Pictures after steps 4 and 5.
STEPS = ["--bf16", "no", "--batch", 16, "--steps", 5, "--log-every", 1, "--save-every", 4, "--picture-every", 4]
EVALUATE = ["--bf16", "no", "--steps", 3, "--num", 32, "--batch", 16, "--classifier-steps", 1]
MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Makes a folder of drawn shapes of three classes: 30 images to learn from and 30 for validation."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        pixels, labels = Shapes(split).batch(range(100))
        for number, label in enumerate(labels.tolist()):
            if label < 3:
                save_image(folder / split / SHAPES[label] / f"{number}.png", to_pil(pixels[number] / 255))
    return folder


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """Makes the run of the plain CPU that the others are compared with, and evaluates it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run("train_vq.py", "--data", images, "--run", folder, *VQ, *STEPS)
    run("train_transformer.py", "--data", images, "--run", folder, *TRANSFORMER, *STEPS,
        "--micro-batch", 16 // MICRO_BATCHES)
    run("evaluate.py", "--run", folder, *EVALUATE)
    return folder


def on_chips(chips, report, script, *arguments):
    """Runs a script on so many devices. Returns what it prints; torch-xla says in it where it compiles, and why.

    report: the file to which torch-xla writes what it counts."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(chips),
        "OMP_NUM_THREADS": "1",
        # Less optimization, as it compiles five times as fast.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        "PT_XLA_DEBUG_LEVEL": "1",
        "XLA_METRICS_FILE": str(report),
    }
    command = [sys.executable, ROOT / script, *map(str, arguments), "--device", "xla"]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    # An operation that torch-xla does not know runs on the host. Only the reading of a number may.
    assert set(re.findall(r"aten::[\w.]+", report.read_text())) <= {"aten::_local_scalar_dense"}
    return result.stdout


def count_compilations(output, first, last):
    """Counts the compilations between the line that begins with `first` and the next that begins with `last`."""
    between = re.search(f"^{first}.*?^{last}", output, re.MULTILINE | re.DOTALL)
    return between.group().count("Compilation Cause")


def check_training(output, chips):
    assert f"on xla:0 x {chips}\n" in output
    assert count_compilations(output, "step 1/5", "step 2/5") > 0          # the first step starts what Adam averages
    assert count_compilations(output, "step 2/5", "step 3/5") == 0
    assert count_compilations(output, "step 3/5", "step 4/5") > 0          # with it the first picture
    assert count_compilations(output, "step 4/5", "wrote ") == 0


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_the_tokenizer_trains_as_on_a_cpu(chips, images, plain, tmp_path):
    output = on_chips(chips, tmp_path / "report.txt", "train_vq.py", "--data", images, "--run", tmp_path / "run",
                      *VQ, *STEPS)
    check_training(output, chips)
    assert_same_log(tmp_path / "run" / "vqgan.log.csv", plain / "vqgan.log.csv", 5, 1e-4, 1e-4)


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_the_transformer_trains_as_on_a_cpu(chips, images, plain, tmp_path):
    micro_batch = 16 // MICRO_BATCHES // chips                                      # images at once on each chip
    output = on_chips(chips, tmp_path / "report.txt", "train_transformer.py", "--data", images,
                      "--run", tmp_path / "run", "--vqgan", plain / "vqgan.pt", *TRANSFORMER, *STEPS,
                      "--micro-batch", micro_batch)
    check_training(output, chips)
    assert_same_log(tmp_path / "run" / "transformer.log.csv", plain / "transformer.log.csv", 5, 1e-4, 1e-4)


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_sampling_editing_and_evaluation(chips, images, plain, tmp_path):
    folder = tmp_path / "run"
    report = tmp_path / "report.txt"
    shutil.copytree(plain, folder)
    on_chips(chips, report, "sample.py", "--run", folder, "--num", 1, "--steps", 3)
    assert (folder / "samples.png").exists()
    on_chips(chips, report, "edit.py", images / "train" / "ball" / "0.png", "--run", folder, "--inpaint", "centre",
             "--num", 2, "--steps", 3)
    assert (folder / "0.inpaint.2.png").exists()
    on_chips(chips, report, "evaluate.py", "--run", folder, *EVALUATE)
    ours = json.loads((folder / "eval.json").read_text())
    theirs = json.loads((plain / "eval.json").read_text())
    # The samples can differ where a token hangs on a product's rounding. The rest is the same.
    assert numbers_in(ours["stages"]) == pytest.approx(numbers_in(theirs["stages"]), rel=1e-4)
    for row in ("real training images", "reconstructions"):
        assert numbers_in(ours["rows"][row]) == pytest.approx(numbers_in(theirs["rows"][row]), rel=1e-3, abs=1e-4), row


def numbers_in(value):
    """Returns the numbers in nested dicts and lists, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value]
    numbers = []
    for item in value:
        numbers += numbers_in(item)
    return numbers


def test_bench_waits_for_what_it_times(tmp_path):
    """Results that nothing holds are not computed at all, which would look like a peak of 100 TFLOP/s."""
    on_chips(1, tmp_path / "report", "bench.py", "--preset", "shapes", "--rows", "decode", "--batch", 2, "--repeats", 1,
             "--bf16", "no", "--json", tmp_path / "bench.json")
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["peak"] < 1e13 and row["share"] < 1
