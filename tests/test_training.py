"""Training as a user runs it: resume after SIGKILL, signals, refusals, logs."""
import copy
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, refused, run
from PIL import Image

import train_transformer
import train_vq
from lib import optim
from lib import run as run_
from lib.files import fingerprint, load_checkpoint, rebuild
from lib.runtime import Machine, step_seed
from vqgan import VQGAN

STAGES = {"train_vq.py": ("vqgan", TINY_VQ), "train_transformer.py": ("transformer", TINY_TRANSFORMER)}


def start(script, *arguments, **options):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, **options)


def read_log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def with_tokenizer(trained, folder):
    folder.mkdir()
    shutil.copy(trained / "vqgan.pt", folder)
    return folder


@pytest.mark.parametrize("script", STAGES)
def test_resume_after_sigkill_is_bit_exact(script, trained, tmp_path):
    stage, flags = STAGES[script]
    folder = with_tokenizer(trained, tmp_path / "killed") if stage == "transformer" else tmp_path / "killed"
    process = start(script, "--run", folder, *flags)
    wait_for_step(process, 5)           # the checkpoint of step 2 is written, and a thread may be writing step 4's
    process.kill()
    process.wait()
    assert load_checkpoint(folder / f"{stage}.resume.pt", f"{stage} training state")["step"] in (2, 4)
    refused(script, "--run", folder, *flags, says=["unfinished", "--resume", "--overwrite"])
    run(script, "--run", folder, *flags, "--resume")
    for name in (f"{stage}.pt", f"{stage}.resume.pt"):
        ours, theirs = (torch.load(f / name, weights_only=True) for f in (folder, trained))
        ours.pop("settings"), theirs.pop("settings")
        assert_same(ours, theirs, name)
    rows = [read_log(f / f"{stage}.log.csv") for f in (folder, trained)]
    without_speed = [[{k: v for k, v in row.items() if not k.endswith("/s")} for row in part] for part in rows]
    assert without_speed[0] == without_speed[1] and len(rows[0]) == 6


def assert_same(a, b, path):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (80, 80), (60 * i, 0, 99)).save(tmp_path / "images" / f"{i}.png")
    # Images of over 64 pixels are read by worker processes; the signal reaches them, too, as Ctrl-C in a terminal does.
    flags = [*TINY_VQ, "--data", tmp_path / "images", "--image-size", 128, "--perceptual", "none", "--workers", 1,
             "--steps", 100000, "--save-every", 100000]
    process = start("train_vq.py", "--run", tmp_path / "a b", *flags, start_new_session=True)
    wait_for_step(process, 2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "--resume" in errors and f"--run '{tmp_path}/a b'" in errors
    saved = load_checkpoint(tmp_path / "a b" / "vqgan.resume.pt", "vqgan training state")["step"]
    assert f"stopped at step {saved} of 100000" in errors and (tmp_path / "a b" / "vqgan.pt").exists()


def test_a_finished_run_is_not_overwritten(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    endings = ("pt", "png", "curve.png", "log.csv", "resume.pt")
    assert {f"{stage}.{ending}" for stage in ("vqgan", "transformer") for ending in endings} == set(before)
    refused("train_vq.py", "--run", folder, *TINY_VQ, says=["finished", "--overwrite"])
    refused("train_vq.py", "--run", folder, *TINY_VQ, "--lr", 0.5, "--resume", says=["lr", "0.5"])
    # A CPU without bfloat16 does not go on silently in float32, nor the other way round.
    refused("train_vq.py", "--run", folder, *TINY_VQ, "--bf16", "yes", "--resume", says=["bf16 = False, not True"])
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    run("train_vq.py", "--run", folder, *TINY_VQ, "--overwrite", "--seed", 1)
    assert (folder / "vqgan.pt").read_bytes() != before["vqgan.pt"]
    assert (folder / "transformer.pt").read_bytes() == before["transformer.pt"]
    # The transformer is now without its tokenizer, which nothing but the fingerprint would show.
    refused("sample.py", "--run", folder, says=["trained again", "--vqgan"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    folder = tmp_path / "run"
    run("train_vq.py", "--run", folder, *TINY_VQ, "--steps", 2)
    state = torch.load(folder / "vqgan.resume.pt", weights_only=True)
    state["settings"]["steps"] = 6                             # as if stopped at step 2 of 6, with one weight destroyed
    state["model"]["decoder.layers.0.weight"][0] = float("nan")
    torch.save(state, folder / "vqgan.resume.pt")
    before = (folder / "vqgan.pt").read_bytes(), (folder / "vqgan.resume.pt").read_bytes()
    refused("train_vq.py", "--run", folder, *TINY_VQ, "--resume",
            says=["nan", "step 3", "last good checkpoint", "lower --lr"])
    assert before == ((folder / "vqgan.pt").read_bytes(), (folder / "vqgan.resume.pt").read_bytes())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: both fail the write in the middle."""
    folder = tmp_path / "run"
    run("train_vq.py", "--run", folder, *TINY_VQ, "--steps", 2)
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}

    def limit():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    refused("train_vq.py", "--run", folder, *TINY_VQ, "--overwrite", says=["cannot write", str(folder)],
            preexec_fn=limit)
    assert not list(folder.glob(".*.tmp"))
    assert all((folder / name).read_bytes() == old for name, old in before.items())


def test_a_save_is_written_while_training_goes_on(trained, tmp_path, monkeypatch):
    """finish_step returns before the file is written; the next save waits for it, and reports what went wrong."""
    model, machine = rebuild(trained / "vqgan.pt", "vqgan", VQGAN)[0], Machine("cpu")
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters())
    args = SimpleNamespace(run=tmp_path / "run", overwrite=False, resume=False, steps=9, batch=4, log_every=9,
                           picture_every=9, save_every=2, data="shapes", seed=0, init=None)
    run = run_.Run("vqgan", {}, {}, ["loss"], args, machine)
    run.start({"model": model, "ema": model, "optimizer": optimizer}, {}, "a tokenizer", 1.0)
    may_write, written = threading.Event(), []

    def slowly(path, checkpoint):
        assert may_write.wait(60)
        written.append((path.name, checkpoint["step"]))
        if checkpoint["step"] == 4:
            raise OSError(f"cannot write {path}")
    monkeypatch.setattr(run_, "save_checkpoint", slowly)
    loss = {"loss": torch.tensor(1.0)}
    for step in (1, 2, 3):
        run.finish_step(step, loss, None)
    assert not written and run.state is None
    before = run.copy["ema"]["decoder.layers.0.weight"].clone()
    with torch.no_grad():
        model.decoder.layers[0].weight.add_(1)                        # what is being written does not change any more
    assert torch.equal(run.copy["ema"]["decoder.layers.0.weight"], before)
    threading.Timer(0.2, may_write.set).start()
    run.finish_step(4, loss, None)
    assert written[:2] == [("vqgan.pt", 2), ("vqgan.resume.pt", 2)]
    with pytest.raises(OSError, match="cannot write"):
        run.finish_step(6, loss, None)


def test_moments_take_the_layout_of_their_weights():
    """Saved by another device they may be contiguous; CPU's fused Adam would take them in another order."""
    def steps(layout_of_state):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        adam = torch.optim.Adam(conv.parameters(), fused=True)
        for _ in range(2):
            conv.weight.grad = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
            conv.bias.grad = torch.randn(4)
            adam.step()
            state = copy.deepcopy(adam.state_dict())
            for moments in state["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    if moments[name].ndim == 4:
                        moments[name] = moments[name].contiguous(memory_format=layout_of_state)
            adam.load_state_dict(state)
            optim.match_layouts(adam)
        return conv.weight
    assert torch.equal(steps(torch.channels_last), steps(torch.contiguous_format))


def test_what_a_kill_left_is_cleared(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".vqgan.pt.host.1.tmp", ".vqgan.resume.pt.host.1.tmp", ".transformer.pt.host.1.tmp"):
        (folder / name).write_text("half")
    run("train_vq.py", "--run", folder, *TINY_VQ, "--steps", 1)
    assert [path.name for path in folder.glob("*.tmp")] == [".transformer.pt.host.1.tmp"]       # of another stage


def test_pictures_and_checkpoints_apart(trained, tmp_path):
    folder = with_tokenizer(trained, tmp_path / "run")
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--picture-every", 4, "--evaluate-every", 3,
        "--evaluate-num", 50, "--classifier-steps", 3)
    rows = read_log(folder / "transformer.log.csv")
    assert [row["step"] for row in rows if row["val_loss"]] == ["4", "6"]
    distances = {int(row["step"]): float(row["FCD"]) for row in rows if row["FCD"]}
    assert list(distances) == [3, 6]
    best = load_checkpoint(folder / "transformer.best.pt", "transformer")
    assert best["step"] == min(distances, key=distances.get)
    for preset in (train_vq.PRESETS["imagenet"], train_transformer.PRESETS["places2"]):
        assert (preset["picture_every"], preset["save_every"]) == (5000, 2000)


@pytest.mark.parametrize("script", STAGES)
def test_a_dry_run_says_what_a_run_would_take(script, trained, tmp_path):
    stage, flags = STAGES[script]
    output = run(script, *flags, "--dry-run", 2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    if stage == "vqgan":
        rows = dict(line.split(maxsplit=1) for line in output.splitlines())
        for figure, name in zip(re.findall(r"([\d.e-]+) GB", rows["checkpoints"]), ("vqgan.pt", "vqgan.resume.pt")):
            assert float(figure) * 1e9 == pytest.approx((trained / name).stat().st_size, rel=0.5)    # small ones: names
    imagined = run(script, "--data", "imagenet", "--dry-run", 400, cwd=tmp_path)
    assert {"vqgan": "54.52 M, 256 tokens of 1024", "transformer": "172.46 M, 256 tokens of 1024"}[stage] in imagined
    hours = re.search(r"([\d.e+]+) P in .*\ntime +([\d.e+]+) hours", imagined)
    assert float(hours[2]) == pytest.approx(float(hours[1]) * 1e15 / 400e12 / 3600, rel=0.01)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refused("train_vq.py", "--run", tmp_path / "file" / "run", *TINY_VQ, says=["cannot write", "--run"])


def test_unknown_losses_and_schedules(trained, tmp_path):
    refused("train_vq.py", "--run", tmp_path, *TINY_VQ, "--gan-loss", "wasserstein", says=["wasserstein", "hinge"])
    refused("train_transformer.py", "--run", trained, *TINY_TRANSFORMER, "--schedule", "quartic",
            says=["quartic", "cosine"])


def test_seeds_differ_by_step_and_rank():
    draws = set()
    for seed in range(3):
        for step in range(50):
            for rank in range(2):
                draws.add(step_seed(seed, step, rank))
    assert len(draws) == 300


def test_fingerprint_sees_every_weight(trained):
    model, _ = rebuild(trained / "vqgan.pt", "vqgan", VQGAN)
    before = fingerprint(model)
    model.decoder.layers[0].bias.data[0] += 1e-3
    assert fingerprint(model) != before


def test_bfloat16_where_the_cpu_computes_it(monkeypatch):
    monkeypatch.undo()                                                       # conftest's float32
    for capabilities, has in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True),
                              ({"avx512_f": True, "avx512_bf16": False}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert Machine("cpu").bf16 is has and Machine("cpu", bf16=not has).bf16 is not has
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert Machine("cpu").bf16 is False                                      # torch before 2.10 does not tell
