"""torch-xla, on its CPU device as if that were 1, 2 and 8 chips: the numbers of plain CPU, and few compilations.

    pip install torch==2.9.0 torch_xla==2.9.0 numpy pillow matplotlib pytest && python -m pytest tests/test_xla.py
"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

from lib.pictures import save_image, to_pil
from lib.shapes import SHAPES, Shapes

pytest.importorskip("torch_xla")

# R1 at every step: one with it and one without are two programs. No dropout: its random numbers are the device's own.
VQ = ["--image-size", 16, "--multipliers", 1, 1, "--filters", 8, "--codebook-size", 32, "--codebook-dim", 4,
      "--disc-width", 1, "--disc-max-width", 8, "--gan-start", 0, "--r1-every", 1]
TRANSFORMER = ["--cache-tokens", 0, "--dropout", 0, "--dim", 16, "--depth", 1, "--heads", 2]
STEPS = ["--bf16", "no", "--batch", 16, "--steps", 5, "--log-every", 1, "--save-every", 4, "--picture-every",
         4]  # previews after 4 and 5
EVALUATE = ["--bf16", "no", "--steps", 3, "--num", 32, "--batch", 16, "--classifier-steps", 1]
PARTS = 2       # micro-batches of the transformer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of drawn shapes of three classes: 30 images to learn from and 30 for validation."""
    folder = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        for number, (image, label) in enumerate(zip(*Shapes(part).batch(range(100)), strict=True)):
            if label < 3:
                save_image(folder / part / SHAPES[label] / f"{number}.png", to_pil(image / 255))
    return folder


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """The run of the plain CPU that the others are compared with, evaluated."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run("train_vq.py", "--data", images, "--run", folder, *VQ, *STEPS)
    run("train_transformer.py", "--data", images, "--run", folder, *TRANSFORMER, *STEPS, "--micro-batch", 16 // PARTS)
    run("evaluate.py", "--run", folder, *EVALUATE)
    return folder


def on_chips(chips, report, script, *arguments):
    """Runs a script on so many devices -> what it prints, with a report of each compilation in its place.

    report: a file, to which torch-xla writes what it counts."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(chips), "OMP_NUM_THREADS": "1",
        # Less optimization: it compiles five times as fast.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        "PT_XLA_DEBUG_LEVEL": "1", "XLA_METRICS_FILE": str(report)}
    result = subprocess.run([sys.executable, ROOT / script, *map(str, arguments), "--device", "xla"], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    # What torch-xla cannot do runs on the host. Only the reading of a number is meant to.
    assert set(re.findall(r"aten::[\w.]+", report.read_text())) <= {"aten::_local_scalar_dense"}
    return result.stdout


def compilations(output, first, last):
    """How many there were between the line that begins with `first` and the next one that begins with `last`."""
    between = re.search(f"^{first}.*?^{last}", output, re.MULTILINE | re.DOTALL)
    return between.group().count("Compilation Cause")


def assert_same_log(ours, theirs):
    """The same numbers in every row, but for the speed."""
    ours, theirs = (list(csv.DictReader(path.read_text().splitlines())) for path in (ours, theirs))
    assert len(ours) == len(theirs) == 5
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in b.keys() - {"images/s", "TFLOP/s"}:
            same = a[name] == b[name] or math.isclose(float(a[name]), float(b[name]), rel_tol=1e-4, abs_tol=1e-4)
            assert same, f"step {step}: {name} is {a[name]}, not {b[name]}"


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_training(chips, images, plain, tmp_path):
    micro_batch = 16 // PARTS // chips                                        # images at once on each chip
    flags = {"vqgan": VQ, "transformer": [*TRANSFORMER, "--vqgan", plain / "vqgan.pt", "--micro-batch", micro_batch]}
    for stage, script in (("vqgan", "train_vq.py"), ("transformer", "train_transformer.py")):
        output = on_chips(chips, tmp_path / f"{stage}.txt",
                          script, "--data", images, "--run", tmp_path / stage, *flags[stage], *STEPS)
        assert f"on xla:0 x {chips}\n" in output
        assert compilations(output, "step 1/5", "step 2/5") > 0           # the first step starts what Adam averages
        assert compilations(output, "step 2/5", "step 3/5") == 0
        assert compilations(output, "step 3/5", "step 4/5") > 0           # with it the first preview
        assert compilations(output, "step 4/5", "wrote ") == 0
        assert_same_log(tmp_path / stage / f"{stage}.log.csv", plain / f"{stage}.log.csv")


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_a_run_in_use(chips, images, plain, tmp_path):
    """Sampling, editing and evaluation of what the plain CPU has trained."""
    folder, report, photo = tmp_path / "run", tmp_path / "report.txt", images / "train" / "ball" / "0.png"
    shutil.copytree(plain, folder)
    on_chips(chips, report, "sample.py", "--run", folder, "--num", 1, "--steps", 3)
    on_chips(chips, report, "edit.py", photo, "--run", folder, "--inpaint", "centre", "--num", 2, "--steps", 3)
    assert (folder / "samples.png").exists() and (folder / "0.inpaint.2.png").exists()
    on_chips(chips, report, "evaluate.py", "--run", folder, *EVALUATE)
    ours, theirs = (json.loads((path / "eval.json").read_text()) for path in (folder, plain))
    # What is drawn is another, as the random numbers are the device's own. The rest is the same.
    assert flat(ours["stages"]) == pytest.approx(flat(theirs["stages"]), rel=1e-4)
    for row in ("real training images", "reconstructions"):
        assert flat(ours["rows"][row]) == pytest.approx(flat(theirs["rows"][row]), rel=1e-3, abs=1e-4), row


def flat(found):
    """The numbers in nested dicts and lists, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    return [number for part in found for number in flat(part)] if isinstance(found, list) else [found]
