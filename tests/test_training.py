"""Training as a user runs it: resuming, also with other settings, after kills and signals; locks, refusals, logs."""
import contextlib
import copy
import errno
import fcntl
import functools
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TINY_TRANSFORMER, TINY_VQ, call_script, on_ranks, read_log, wait_for_step
from PIL import Image

import train_transformer
import train_vq
from lib import optim, pictures
from lib import run as run_module
from lib.errors import UserError
from lib.files import fingerprint, load_checkpoint, rebuild
from lib.log import Log
from lib.run import Run
from lib.runtime import Machine, step_seed
from maskgit import MaskGIT, MaskGITConfig, by_confidence
from vqgan import VQGAN, VQGANConfig

STAGES = {"vqgan": (train_vq, TINY_VQ), "transformer": (train_transformer, TINY_TRANSFORMER)}


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run of both stages, to be changed."""
    return shutil.copytree(trained, tmp_path / "copied")


def folder_for(stage, trained, folder):
    """Returns a new run's folder, with a tokenizer if the stage needs one."""
    folder.mkdir()
    if stage == "transformer":
        shutil.copy(trained / "vqgan.pt", folder)
    return folder


def at_step(number, action, monkeypatch):
    """Has action() called at the beginning of a step of the training, counted from 0."""
    original = Machine.seed_step

    def seed_step(machine, seed, step):
        if step == number:
            action()
        return original(machine, seed, step)
    monkeypatch.setattr(Machine, "seed_step", seed_step)


def test_validation_weighs_images_alike():
    """Also those of the last batch, of which there are few."""
    class Knows(torch.nn.Module):
        """Predicts the right token, 0, for class 0 alone."""
        mask_id = 2

        def forward(self, tokens, labels):
            return torch.stack([100 * (labels[:, None] == 0).expand(tokens.shape), torch.zeros(tokens.shape)], -1)
    labels = torch.zeros(65, dtype=torch.long)
    labels[64] = 1
    args = Namespace(schedule="cosine", label_smoothing=0.0)
    tokens = torch.zeros(65, 4, dtype=torch.long)
    losses = train_transformer.validation(args, Knows(), tokens, labels, Machine("cpu", bf16=False))
    assert losses == pytest.approx(dict.fromkeys(("val_loss", "val_nll"), math.log(2) / 65))


@pytest.mark.parametrize("tokens, codes, usage", [([0, 1, 2, 3], 1024, 1), ([0, 0, 5, 5], 1024, 0.5), ([0, 1, 1, 1], 2, 1)])
def test_usage_is_of_the_codes_that_so_many_tokens_can_use(tokens, codes, usage):
    images = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    assert train_vq.validation(images, images / 255, torch.tensor(tokens).view(1, 2, 2), codes)["usage"] == usage


def test_a_preview_has_the_captions_of_its_rows(monkeypatch, tmp_path):
    captions = []

    def grid(rows, names):
        captions.extend(names)
        return Image.new("RGB", (8, 8))
    monkeypatch.setattr(train_transformer, "grid", grid)
    monkeypatch.setattr(train_transformer, "draw", lambda *arguments: torch.zeros(80, 3, 8, 8))
    run = Namespace(picture=tmp_path / "a.png")
    train_transformer.save_preview(run, None, None, [str(i) for i in range(1000)], Machine("cpu"))
    assert captions == [str(i) for i in range(10)]


def test_a_preview_takes_the_noise_that_the_run_records(monkeypatch):
    noises = []

    def order(choice_temperature):
        noises.append(choice_temperature)
        return by_confidence(choice_temperature)
    monkeypatch.setattr(train_transformer, "by_confidence", order)
    config = MaskGITConfig(8, 2, 4, dim=8, depth=1, heads=1, mlp_dim=8, choice_temperature=2.5)
    tokenizer = Namespace(model=Namespace(decode=lambda tokens: torch.zeros(len(tokens), 3, 2, 2)))
    labels = torch.zeros(1, dtype=torch.long)
    train_transformer.draw(MaskGIT(config), tokenizer, labels, labels, Machine("cpu"))
    assert noises == [2.5]


@pytest.mark.parametrize("leads, mesh, written", [
    (True, None, ["fetched", "written"]), (False, None, []), (True, "chips", ["fetched", "written"]),
    (False, "chips", ["fetched"])])
def test_all_hosts_of_a_tpu_fetch_what_the_first_one_writes(leads, mesh, written, monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(run_module, "on_cpu", lambda checkpoint: events.append("fetched"))
    monkeypatch.setattr(run_module, "save_checkpoint", lambda path, checkpoint: events.append("written"))
    training = lock(tmp_path)
    training.machine.leads = leads
    training.machine.mesh = mesh
    training.keep_best(1, 2.0, "FCD", VQGAN(VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1)), {})
    assert events == written


def load_state(folder, stage):
    return load_checkpoint(folder / f"{stage}.resume.pt", f"{stage} training state")


def contents(folder):
    """Returns the bytes of a folder's files by name, but for hidden ones such as locks."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def make_images(folder, names, size=(32, 32)):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", size, (60 * i, 0, 99)).save(folder / name / f"{i}.png")
    return folder


# ---- a run that is killed

def train_until_killed_in_its_fourth_save(stage, folder):
    """Ends between the model and the state of step 4: the one is new, the other that of step 2."""
    original = run_module.save_checkpoint
    saved = []

    def save_and_die(path, checkpoint):
        original(path, checkpoint)
        saved.append(path)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    run_module.save_checkpoint = save_and_die
    script, flags = STAGES[stage]
    call_script(script.__name__, "--run", folder, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_resumes_bit_for_bit(stage, trained, tmp_path, call_main):
    script, flags = STAGES[stage]
    folder = folder_for(stage, trained, tmp_path / "killed")
    assert on_ranks(train_until_killed_in_its_fourth_save, stage, folder, world=1) == [-signal.SIGKILL]
    assert load_checkpoint(folder / f"{stage}.pt", stage)["step"] == 4 and load_state(folder, stage)["step"] == 2
    line = call_main(script, tmp_path, "--run", folder, *flags, code=2)
    assert all(word in line for word in ("unfinished (step 2 of 6)", "--resume", "--overwrite"))
    assert "resuming with" not in call_main(script, tmp_path, "--run", folder, *flags, "--resume")
    for name in (f"{stage}.pt", f"{stage}.resume.pt"):
        assert_same(torch.load(folder / name, weights_only=True), torch.load(trained / name, weights_only=True), name)
    rows = read_log(folder / f"{stage}.log.csv")
    assert [row["step"] for row in rows] == list("123456")
    for row, expected in zip(rows, read_log(trained / f"{stage}.log.csv"), strict=True):
        for name in expected.keys() - {"images/s", "TFLOP/s"}:
            assert row[name] == expected[name], name


def assert_same(ours, theirs, path):
    """Compares nested dicts and lists of tensors and plain values, bit for bit."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs), path
    else:
        assert ours == theirs, path


def test_what_a_kill_left_is_cleared(tmp_path):
    for name in (".vqgan.pt.host.1.tmp", ".vqgan.resume.pt.host.1.tmp", ".transformer.pt.host.1.tmp"):
        (tmp_path / name).write_text("half")
    Run("vqgan", Namespace(run=tmp_path, overwrite=False, resume=False), Machine("cpu"))
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".transformer.pt.host.1.tmp"]          # of another stage


def test_moments_take_the_layout_of_their_weights():
    """Saved by another device they may be contiguous; the CPU's fused Adam would take them in another order."""
    def train(layout_of_state):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        adam = torch.optim.Adam(conv.parameters(), fused=True)
        for _ in range(2):
            conv.weight.grad = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
            conv.bias.grad = torch.randn(4)
            adam.step()
            state = copy.deepcopy(adam.state_dict())
            for name in ("exp_avg", "exp_avg_sq"):
                state["state"][0][name] = state["state"][0][name].contiguous(memory_format=layout_of_state)
            optim.load_optimizer(adam, state)
        return conv.weight
    assert torch.equal(train(torch.channels_last), train(torch.contiguous_format))


@pytest.mark.parametrize("fused, place", [(True, "meta"), (False, "cpu")])
def test_step_counts_are_where_the_optimizer_needs_them(fused, place):
    """Fused on the device, and else on the CPU, as in torch-xla; torch goes by the optimizer that saved them."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight], fused=not fused)
    weight.sum().backward()
    adam.step()
    elsewhere = torch.optim.Adam([torch.nn.Parameter(torch.ones(2, device="meta"))])
    elsewhere.param_groups[0]["fused"] = fused
    optim.load_optimizer(elsewhere, adam.state_dict())
    moments, = elsewhere.state.values()
    assert {name: value.device.type for name, value in moments.items()} == {
        "step": place, "exp_avg": "meta", "exp_avg_sq": "meta"}


# ---- a run that goes on with other settings

@pytest.mark.slow
def test_stage_1_resumes_with_another_length_batch_and_rates(copied, call_main, tmp_path):
    """At rates of 0 no weight moves: the new ones are used."""
    (copied / "transformer.pt").unlink()
    before = load_state(copied, "vqgan")
    command = ["--run", copied, *TINY_VQ, "--resume", "--steps", 8, "--lr", 0, "--disc-lr", 0, "--batch", 2,
               "--decay", "no", "--multipliers", 1, 1, 1]
    output = call_main(train_vq, tmp_path, *command)
    line, = [line for line in output.splitlines() if line.startswith("resuming with ")]
    for change in ("steps 8 (was 6)", "lr 0.0 (was 0.003)", "disc_lr 0.0 (was 0.001)", "batch 2 (was 4)",
                   "decay no (was yes)"):
        assert change in line
    assert "multipliers" not in line                                # they are the default, and only given by hand
    after = load_state(copied, "vqgan")
    assert (before["step"], after["step"]) == (6, 8)
    assert_same(after["model"], before["model"], "model")
    assert_same(after["disc"], before["disc"], "disc")
    moments_before = before["disc_optimizer"]["state"][0]["exp_avg"]
    assert not torch.equal(after["disc_optimizer"]["state"][0]["exp_avg"], moments_before)        # it did take steps
    # The new settings are the run's: another resumption with them has nothing to say.
    assert "resuming with" not in call_main(train_vq, tmp_path, *command)


def test_longer_training_does_not_stop_the_discriminator(copied, call_main, tmp_path):
    """It started at half of 6 steps. Half of 20 steps are step 10."""
    (copied / "transformer.pt").unlink()
    call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, "--resume", "--steps", 20, "--gan-ramp", 1)
    rows = read_log(copied / "vqgan.log.csv")
    assert [row["step"] for row in rows if row["generator"]] == [str(step) for step in range(4, 21)]


@pytest.mark.parametrize("script, flags", STAGES.values())
@pytest.mark.parametrize("steps", [3, 6])
def test_a_run_that_has_its_steps_says_so(steps, script, flags, copied, call_main, tmp_path):
    before = contents(copied)
    output = call_main(script, tmp_path, "--run", copied, *flags, "--resume", "--steps", steps)
    assert "already at step 6: raise --steps" in output and "wrote" not in output
    assert contents(copied) == before


def test_a_tokenizer_whose_transformer_is_trained_is_not_trained_on(copied, call_main, tmp_path):
    before = contents(copied)
    line = call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, "--resume", "--steps", 20, code=2)
    assert "transformer.pt was trained on the tokens of" in line and "copy vqgan.pt and vqgan.resume.pt to another folder" in line
    assert contents(copied) == before


@pytest.mark.parametrize("script, flags, says", [
    (train_vq, ["--quantizer", "fsq", "--codebook-size", 4096], "--codebook-size changes nothing with --quantizer fsq"),
    (train_vq, ["--levels", 5, 5], "--levels changes nothing without --quantizer fsq"),
    (train_transformer, ["--decoder", "autoregressive", "--schedule", "cosine"], "--schedule changes nothing with --decoder"),
    (train_transformer, ["--decoder", "autoregressive", "--class-dropout", 0.2], "--class-dropout changes nothing"),
    (train_transformer, ["--features", "classifier"], "--features changes nothing without --evaluate-every"),
    (train_transformer, ["--optimizer", "adamw", "--muon-lr", 1], "--muon-lr changes nothing with --optimizer adamw"),
])
def test_flags_that_change_nothing_are_refused(script, flags, says, call_main, tmp_path):
    assert says in call_main(script, tmp_path, "--run", "new", *flags, code=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--lr", "--muon-lr"])
def test_stage_2_resumes_with_another_rate_of_either_optimizer(flag, copied, call_main, tmp_path):
    """Where a rate is 0, the weights of that optimizer stay, and the others move."""
    before = load_state(copied, "transformer")["model"]
    output = call_main(train_transformer, tmp_path, "--run", copied, *TINY_TRANSFORMER, "--resume", "--steps", 8,
                       flag, 0)
    assert f"{flag[2:].replace('-', '_')} 0.0 (was " in output
    # On a terminal the end of a line is cut off: what one looks for comes first.
    assert re.search(r"^step 8/8  0:00:00 left  \d+ images/s \(.*\)  loss ", output, re.MULTILINE)
    after = load_state(copied, "transformer")["model"]
    for name in before:
        of_muon = name.startswith("blocks.") and before[name].ndim == 2
        stays = of_muon if flag == "--muon-lr" else not of_muon
        assert torch.equal(before[name], after[name]) is stays, name


@pytest.mark.parametrize("stage, change, setting", [
    ("vqgan", ["--filters", 16], "filters = 8, not 16"),
    ("vqgan", ["--disc-width", 2], "disc_width = 1, not 2"),
    ("transformer", ["--dim", 32], "dim = 16, not 32"),
    ("transformer", ["--class-dropout", 0.1], "class_dropout > 0 = no, not yes"),
    ("transformer", ["--optimizer", "adamw"], "optimizer = muon, not adamw"),
])
def test_what_weights_depend_on_cannot_change(stage, change, setting, copied, call_main, tmp_path):
    before = contents(copied)
    script, flags = STAGES[stage]
    line = call_main(script, tmp_path, "--run", copied, *flags, "--resume", *change, code=2)
    assert setting in line and "--overwrite" in line
    assert contents(copied) == before


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", STAGES.values())
def test_a_run_that_was_started_with_init_resumes_with_it_only(script, flags, trained, call_main, tmp_path):
    """Its sizes are those of the run it started from, and not those of the flags; that run may be gone by then."""
    shutil.copytree(trained, tmp_path / "first")
    flags = [*flags, "--run", "run", "--save-every", 1, "--steps"]
    if script is train_transformer:
        flags = ["--vqgan", trained / "vqgan.pt", "--dim", 48, *flags]
    else:
        flags = ["--filters", 24, *flags]
    call_main(script, tmp_path, *flags, 1, "--init", "first")
    shutil.rmtree(tmp_path / "first")
    assert "steps 2 (was 1)" in call_main(script, tmp_path, *flags, 2, "--init", "first", "--resume")
    line = call_main(script, tmp_path, *flags, 2, "--resume", code=2)
    assert "init = first, not none" in line or "was started with filters" in line or "was started with dim" in line


def test_other_classes_are_refused_in_a_line(trained, call_main, tmp_path):
    make_images(tmp_path / "images", ["cat", "dog"])
    flags = ["--data", "images", "--vqgan", trained / "vqgan.pt", *TINY_TRANSFORMER, "--steps", 1]
    call_main(train_transformer, tmp_path, *flags)
    make_images(tmp_path / "images", ["emu"])
    line = call_main(train_transformer, tmp_path, *flags, "--resume", code=2)
    assert "classes have changed" in line and "(emu)" in line and "--overwrite" in line


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_a_lower_rate_goes_on(copied, call_main, tmp_path):
    (copied / "transformer.pt").unlink()
    before = contents(copied)
    line = call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, "--resume", "--steps", 12, "--lr", 1e30, code=2)
    for word in ("became nan", "last good checkpoint", "vqgan.resume.pt", "--resume and a lower --lr"):
        assert word in line
    for name in ("vqgan.pt", "vqgan.resume.pt"):
        assert (copied / name).read_bytes() == before[name]
    output = call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, "--resume", "--steps", 12, "--lr", 1e-4)
    assert "lr 0.0001 (was 0.003)" in output
    rows = read_log(copied / "vqgan.log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert all(math.isfinite(float(row["reconstruction"])) for row in rows)


# ---- a run that is in the way

@pytest.mark.slow
def test_a_finished_run_is_overwritten_only_if_asked(copied, call_main, tmp_path):
    before = contents(copied)
    line = call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, code=2)
    assert "holds a finished vqgan" in line and "--overwrite" in line
    assert contents(copied) == before
    call_main(train_vq, tmp_path, "--run", copied, *TINY_VQ, "--overwrite", "--seed", 1)
    after = contents(copied)
    assert after["vqgan.pt"] != before["vqgan.pt"] and after["transformer.pt"] == before["transformer.pt"]


def test_an_overwritten_run_is_not_resumed(copied):
    """As if the new one had been killed before its first checkpoint."""
    (copied / "vqgan.best.pt").write_text("an old one")
    new = Run("vqgan", Namespace(run=copied, overwrite=True, resume=False), Machine("cpu"))
    new.restore({})
    new.discard_former()
    assert {path.name for path in copied.glob("vqgan*.pt")} == {"vqgan.pt"}
    with pytest.raises(UserError, match="no vqgan.resume.pt to resume from"):
        Run("vqgan", Namespace(run=copied, overwrite=False, resume=True), Machine("cpu"))


def lock(folder, stage="vqgan"):
    return Run(stage, Namespace(run=folder, overwrite=False, resume=False), Machine("cpu"))


def exit_as_the_lock_says(folder, stage):
    """Ends with the status 2 if the folder is locked for this stage."""
    try:
        lock(folder, stage)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def test_a_second_training_of_a_stage_in_one_folder_is_refused(tmp_path, capfd):
    first = lock(tmp_path)
    assert on_ranks(exit_as_the_lock_says, tmp_path, "vqgan", world=1) == [2]
    assert f"another process is training the vqgan in {tmp_path}" in capfd.readouterr().err
    assert on_ranks(exit_as_the_lock_says, tmp_path, "transformer", world=1) == [0]
    first.lock.close()
    assert on_ranks(exit_as_the_lock_says, tmp_path, "vqgan", world=1) == [0]


def test_the_lock_of_a_killed_training_does_not_matter_even_if_its_readers_live(tmp_path):
    training = os.fork()
    if training == 0:
        held = lock(tmp_path)
        reader = os.fork()                                          # stands for a process that reads images
        if reader == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "reader").write_text(f"{reader} {held.lock}")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(training, 0)
    reader = int((tmp_path / "reader").read_text().split()[0])
    try:
        assert (tmp_path / ".vqgan.lock").exists()
        lock(tmp_path)
    finally:
        os.kill(reader, signal.SIGKILL)


def test_a_lock_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """The process that held it has ended after this one opened it, and before this one locked it."""
    path = tmp_path / ".vqgan.lock"
    original = fcntl.lockf

    def remove_first(file, operation):
        monkeypatch.undo()
        path.unlink()
        original(file, operation)
    monkeypatch.setattr(fcntl, "lockf", remove_first)
    held = lock(tmp_path)
    assert path.exists() and not held.lock.closed
    assert on_ranks(exit_as_the_lock_says, tmp_path, "vqgan", world=1) == [2]


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock(tmp_path)
    assert "cannot be locked (No locks available): do not train" in capsys.readouterr().err


def test_a_run_inside_its_data_is_refused(call_main, tmp_path):
    images = make_images(tmp_path / "images", ["cat", "dog"])
    for script, flags in STAGES.values():
        line = call_main(script, images, "--data", ".", *flags, code=2)
        assert "lies inside its data" in line and "--run" in line
    assert sorted(path.name for path in images.iterdir()) == ["cat", "dog"]


def test_a_full_disk_leaves_the_last_checkpoint(copied, capfd):
    """A limit on the size of files stands in for a full disk: both fail the write in the middle."""
    (copied / "transformer.pt").unlink()
    before = contents(copied)

    def train():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        call_script("train_vq", "--run", copied, *TINY_VQ, "--resume", "--steps", 8, "--save-every", 1)
    assert on_ranks(train, world=1) == [2]
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write {copied}" in line and "free some space" in line
    assert not list(copied.glob(".*.tmp"))
    for name in ("vqgan.pt", "vqgan.resume.pt"):
        assert (copied / name).read_bytes() == before[name]


def test_a_log_that_cannot_be_written_ends_in_a_line(tmp_path):
    log = Log(lock(tmp_path), 0)
    log._write_row({"step": 1})
    log.run.log_file.unlink()
    log.run.log_file.symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*vqgan.log.csv .No space left.*: free some space"):
        log._write_row({"step": 2})


# ---- signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_two_signals_within_a_moment_save_before_anything_is_drawn(
        stage, number, trained, call_main, tmp_path, monkeypatch):
    """torchrun passes a SIGTERM on, and a scheduler sends it to every process as well."""
    def send_twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    at_step(3, send_twice, monkeypatch)
    script, flags = STAGES[stage]
    folder = folder_for(stage, trained, tmp_path / "run")
    line = call_main(script, tmp_path, "--run", folder, *flags, "--save-every", 100, "--picture-every", 4,
                     code=128 + number)
    assert "stopped at step 4 of 6" in line and "--resume" in line
    assert load_state(folder, stage)["step"] == load_checkpoint(folder / f"{stage}.pt", stage)["step"] == 4
    assert len(read_log(folder / f"{stage}.log.csv")) == 4
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_in_the_last_step_lets_the_run_end(stage, trained, call_main, tmp_path, monkeypatch):
    at_step(1, functools.partial(os.kill, os.getpid(), signal.SIGTERM), monkeypatch)
    script, flags = STAGES[stage]
    folder = folder_for(stage, trained, tmp_path / "run")
    assert "wrote" in call_main(script, tmp_path, "--run", folder, *flags, "--steps", 2)
    assert (folder / f"{stage}.png").exists() and load_state(folder, stage)["step"] == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_while_it_draws_has_saved(stage, trained, call_main, tmp_path, monkeypatch):
    script, flags = STAGES[stage]
    folder = folder_for(stage, trained, tmp_path / "run")
    monkeypatch.setattr(script, "save_preview", lambda *arguments: signal.default_int_handler(signal.SIGINT, None))
    call_main(script, tmp_path, "--run", folder, *flags, "--save-every", 1, "--picture-every", 1, code=130)
    assert load_state(folder, stage)["step"] == 1


def test_a_signal_that_is_repeated_after_a_while_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    assert run_module.REPEAT_SECONDS == 3
    monkeypatch.setattr(run_module, "REPEAT_SECONDS", 0.01)

    def insist():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
    at_step(3, insist, monkeypatch)
    flags = [*TINY_VQ, "--save-every", 100]
    assert on_ranks(call_script, "train_vq", "--run", tmp_path, *flags, world=1) == [-signal.SIGTERM]
    assert capfd.readouterr().err.count("stopping at the end of a step") == 1
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_training_and_its_readers_saves(number, tmp_path):
    """Ctrl-C in a terminal reaches all of them. Images of over 64 pixels are read by processes of their own."""
    make_images(tmp_path / "images", ["cat"], size=(80, 80))
    flags = [*TINY_VQ, "--data", tmp_path / "images", "--image-size", 128, "--perceptual", "none", "--workers", 1,
             "--steps", 100_000, "--save-every", 100_000, "--picture-every", 100_000]
    command = [sys.executable, ROOT / "train_vq.py", "--run", tmp_path / "run", *flags]
    process = subprocess.Popen(list(map(str, command)), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    wait_for_step(process, 2)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"stopped at step {load_state(tmp_path / 'run', 'vqgan')['step']} of 100000" in errors


# ---- pictures, measurements, plans

def test_a_run_holds_its_files_and_is_validated_now_and_then(trained):
    for stage, column in (("vqgan", "psnr"), ("transformer", "val_loss")):
        assert {f"{stage}.{ending}" for ending in ("pt", "resume.pt", "log.csv")} <= set(contents(trained))
        rows = read_log(trained / f"{stage}.log.csv")
        assert [row["step"] for row in rows] == list("123456")
        assert [row["step"] for row in rows if row[column]] == ["4", "6"]
        with Image.open(trained / f"{stage}.png") as picture:
            assert picture.width > 8 * 64
        # Curves are drawn of the whole log (in the tests it is only copied: see conftest.py).
        assert (trained / f"{stage}.curve.png").read_text() == (trained / f"{stage}.log.csv").read_text()


def test_a_row_that_a_full_disk_cut_off_is_dropped(tmp_path):
    flags = Namespace(run=tmp_path, overwrite=False, resume=False)
    run = Run("vqgan", flags, Machine("cpu"))
    run.log_file.write_text("step,images/s,TFLOP/s,loss\n15,1,1,2.5\n16")
    run.step = 1600
    log = Log(run, 0)
    log._write_row({"step": 1700, "loss": 3.0})
    assert [row["step"] for row in read_log(run.log_file)] == ["15", "1700"]


def test_the_log_is_never_cut_short(tmp_path):
    """A new column and a resumption replace the file: what another process reads is whole."""
    log = Log(Run("vqgan", Namespace(run=tmp_path, overwrite=False, resume=False), Machine("cpu")), 0)
    log._write_row({"step": 1, "loss": 3.0})
    with open(log.run.log_file) as old:
        log._write_row({"step": 2, "loss": 2.0, "psnr": 9.0})
        assert old.read().splitlines()[-1] == "1,,,3"
    assert log.run.log_file.read_text().splitlines() == ["step,images/s,TFLOP/s,loss,psnr", "1,,,3,", "2,,,2,9"]


def test_the_discriminators_steps_and_gradients_are_logged(trained):
    rows = read_log(trained / "vqgan.log.csv")
    assert [row["step"] for row in rows if row["disc_gradient"] and float(row["disc_gradient"]) > 0] == list("456")
    flops = [float(row["TFLOP/s"]) / float(row["images/s"]) for row in rows[1:]]
    assert flops[0] == pytest.approx(flops[1], rel=1e-4) and 1.05 * flops[1] < flops[2] == pytest.approx(flops[4], rel=1e-4)


def test_the_command_of_stage_2_names_the_same_data_and_preset():
    args = Namespace(data="cifar10", preset="cifar10", data_dir="data", run="runs/a")
    assert train_vq.next_command(args) == "python train_transformer.py --data cifar10 --run runs/a"
    args = Namespace(data="/photos", preset="imagenet", data_dir="/disk", run="runs/a")
    assert train_vq.next_command(args).endswith("--run runs/a --preset imagenet --data-dir /disk")


def test_curves_are_of_the_columns_that_hold_numbers(tmp_path, monkeypatch):
    new_figure = pictures.new_figure
    curves = {}

    @contextlib.contextmanager
    def watched(*arguments, **options):
        with new_figure(*arguments, **options) as (figure, axes):
            yield figure, axes
            for axis in axes:
                curves[axis.get_title()] = axis.lines[0].get_xydata().tolist()
    monkeypatch.setattr(pictures, "new_figure", watched)
    (tmp_path / "log.csv").write_text("step,loss,val_loss,FCD\n50,3,,\n100,2.5,4,\n120,2,3.5,\n")
    pictures.draw_log(tmp_path / "curve.png", tmp_path / "log.csv")
    assert curves == {"loss": [[50, 3], [100, 2.5], [120, 2]], "val_loss": [[100, 4], [120, 3.5]]}
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.width > curve.height


@pytest.mark.slow
def test_pictures_and_measurements_have_steps_of_their_own(trained, call_main, tmp_path):
    folder = folder_for("transformer", trained, tmp_path / "run")
    call_main(train_transformer, tmp_path, "--run", folder, *TINY_TRANSFORMER, "--picture-every", 4,
              "--evaluate-every", 3, "--evaluate-num", 50, "--classifier-steps", 3)
    rows = read_log(folder / "transformer.log.csv")
    assert [row["step"] for row in rows if row["val_loss"]] == ["4", "6"]
    distances = {int(row["step"]): float(row["FCD"]) for row in rows if row["FCD"]}
    assert list(distances) == [3, 6]
    best = load_checkpoint(folder / "transformer.best.pt", "transformer")
    assert best["step"] == min(distances, key=distances.get)


def test_the_best_weights_have_the_least_distance_of_one_kind(tmp_path, capsys):
    """Also after a resumption: each row is a process of its own."""
    model = VQGAN(VQGANConfig(32, 4, 8, (1, 1, 1), 1, 1))
    for step, distance, measure, best in ((1, 3.0, "FCD", 1), (2, 4.0, "FCD", 1), (3, 2.0, "FCD", 3),
                                          (4, math.nan, "FCD", 3), (5, math.nan, "FID", 3), (6, 20.0, "FID", 6)):
        lock(tmp_path).keep_best(step, distance, measure, model, {})
        assert load_checkpoint(tmp_path / "vqgan.best.pt", "vqgan")["step"] == best
    assert capsys.readouterr().out.count("another distance than the FID") == 1


def test_a_dry_run_says_how_large_the_files_will_be(trained, call_main, tmp_path):
    output = call_main(train_vq, tmp_path, *TINY_VQ, "--dry-run", 2)
    assert not list(tmp_path.iterdir())
    checkpoints = re.search(r"checkpoints +([\d.e-]+) GB for use, ([\d.e-]+) GB to go on from", output)
    for figure, name in zip(checkpoints.groups(), ("vqgan.pt", "vqgan.resume.pt"), strict=True):
        assert float(figure) * 1e9 == pytest.approx((trained / name).stat().st_size, rel=0.5)    # names take room as well


@pytest.mark.slow
@pytest.mark.parametrize("stage, size", [("vqgan", "54.52 M, 256 tokens of 1024"),
                                         ("transformer", "172.46 M, 256 tokens of 1024")])
def test_a_dry_run_of_the_papers_models_says_how_long_they_will_take(stage, size, call_main, tmp_path):
    script, _ = STAGES[stage]
    output = call_main(script, tmp_path, "--data", "imagenet", "--dry-run", 400)
    assert size in output
    hours = re.search(r"([\d.e+]+) P in .*\ntime +([\d.e+]+) hours", output)
    assert float(hours[2]) == pytest.approx(float(hours[1]) * 1e15 / 400e12 / 3600, rel=0.01)


# ---- what a run depends on

def test_seeds_differ_by_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(2)}
    assert len(seeds) == 300


def test_the_fingerprint_sees_every_weight(untrained):
    model, _ = rebuild(untrained / "vqgan.pt", "vqgan", VQGAN)
    before = fingerprint(model)
    model.decoder.layers[0].bias.data[0] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("capabilities, has_it", [
    ({"avx512_bf16": True}, True),
    ({"amx_bf16": True}, True),
    ({"bf16": True}, True),
    ({"avx512_f": True, "avx512_bf16": False}, False),
    (None, False),                                                                  # torch before 2.10 does not tell
])
def test_bfloat16_is_used_where_the_cpu_computes_it(capabilities, has_it, monkeypatch):
    monkeypatch.undo()                                                              # conftest's float32
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Machine("cpu").bf16 is has_it
    assert Machine("cpu", bf16=not has_it).bf16 is not has_it
