"""torch-xla, on its CPU device as if that were 1, 2 and 8 chips: the numbers of plain CPU, few compilations, no detours.

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
from test_data import make_folder

pytest.importorskip("torch_xla")

# R1 at every step: one with it and one without are two programs. No dropout: its random numbers are the device's own.
VQ = ["--image-size", 16, "--multipliers", 1, 1, "--filters", 8, "--codebook-size", 32, "--codebook-dim", 4, "--batch", 8,
      "--disc-width", 1, "--disc-max-width", 8, "--gan-start", 0, "--r1-every", 1]
TRANSFORMER = ["--dropout", 0, "--dim", 16, "--depth", 1, "--heads", 2, "--mlp-dim", 32, "--batch", 8]
STEPS = ["--bf16", "no", "--steps", 5, "--log-every", 1, "--save-every", 4]            # with previews after steps 4 and 5
EVALUATE = ["--num", 60, "--batch", 32, "--classifier-steps", 2, "--bf16", "no"]       # neither 60 - 32 nor 5 divide by 8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"), {"a": 30, "b": 30, "c": 30}, size=(20, 24))


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    """The run on the plain CPU that the others are compared with, evaluated."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run("train_vq.py", "--data", images, "--run", folder, *VQ, *STEPS)
    run("train_transformer.py", "--data", images, "--run", folder, *TRANSFORMER, *STEPS)
    run("evaluate.py", "--run", folder, *EVALUATE)
    return folder


def on_chips(chips, script, *arguments, report):
    """Runs a script on so many devices -> what it prints, with a report of each compilation in its place.

    report: a file, to which torch-xla writes what it counts."""
    environment = os.environ | {
        "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(chips), "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",                             # it compiles three times as fast
        "PT_XLA_DEBUG_LEVEL": "1", "XLA_METRICS_FILE": str(report)}
    result = subprocess.run([sys.executable, ROOT / script, *map(str, arguments), "--device", "xla"], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
    # Operations that torch-xla does not have run on the host. The one that reads a number is meant to.
    assert set(re.findall(r"aten::\w+", report.read_text())) <= {"aten::_local_scalar_dense"}
    return result.stdout


def compilations(output, after, before):
    """How many there were between the lines that begin with `after` and with `before`."""
    between = re.search(rf"^{after}.*?(?=^{before})", output, re.MULTILINE | re.DOTALL)
    return between.group().count("Compilation Cause")


def assert_like(ours, theirs):
    """The same columns and numbers in every row of two logs, but for the speed."""
    ours, theirs = (list(csv.DictReader(path.read_text().splitlines())) for path in (ours, theirs))
    assert len(ours) == len(theirs) == 5
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in a.keys() | b.keys() - {"images/s"}:
            if name != "images/s" and a[name] != b[name]:
                assert math.isclose(float(a[name]), float(b[name]), rel_tol=1e-4, abs_tol=1e-4), (step, name, a, b)


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_training(chips, images, plain, tmp_path):
    parts = ["--micro-batch", max(1, 4 // chips)]                                  # two, but for 8 chips: one image on each
    for script, stage, flags in (("train_vq.py", "vqgan", VQ),
                                 ("train_transformer.py", "transformer",
                                  [*TRANSFORMER, *parts, "--vqgan", plain / "vqgan.pt"])):
        output = on_chips(chips, script, "--data", images, "--run", tmp_path / stage, *flags, *STEPS,
                          report=tmp_path / f"{stage}.txt")
        assert f"on xla:0 x {chips}\n" in output
        assert compilations(output, "step 1/5", "step 2/5") > 0                    # that of a step with Adam's averages
        assert compilations(output, "step 2/5", "step 3/5") == 0
        assert compilations(output, "step 3/5", "step 4/5") > 0                    # of the first preview
        assert compilations(output, "step 4/5", "the ") == 0
        assert_like(tmp_path / stage / f"{stage}.log.csv", plain / f"{stage}.log.csv")


@pytest.mark.parametrize("chips", [1, 2, 8])
def test_what_a_run_is_for(chips, images, plain, tmp_path):
    """Sampling, editing and evaluation of a run of the plain CPU."""
    folder, report = tmp_path / "run", tmp_path / "report.txt"
    shutil.copytree(plain, folder)
    on_chips(chips, "sample.py", "--run", folder, "--num", 1, report=report)
    on_chips(chips, "edit.py", images / "a" / "000.png", "--run", folder, "--inpaint", "centre", "--num", 2, report=report)
    assert (folder / "samples.png").exists() and (folder / "000.inpaint.2.png").exists()
    on_chips(chips, "evaluate.py", "--run", folder, *EVALUATE, report=report)
    ours, theirs = (json.loads((path / "eval.json").read_text()) for path in (folder, plain))
    # The samples are others, as the random numbers are the device's own.
    for name, of in (("stages", lambda found: found["stages"]), ("rows", lambda found: found["rows"]["reconstructions"])):
        assert numbers(of(ours)) == pytest.approx(numbers(of(theirs)), rel=1e-4, abs=1e-5), name


def numbers(found):
    """All numbers in nested dicts and lists, in order."""
    if isinstance(found, dict):
        found = list(found.values())
    return [number for part in found for number in numbers(part)] if isinstance(found, list) else [found]
