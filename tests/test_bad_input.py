"""Bad inputs: each ends in one line on stderr that names the thing, with status 2, and changes no file."""
import os
import shutil
import struct
import sys

import pytest
import torch
from conftest import TINY_TRANSFORMER, TINY_VQ
from PIL import Image

import bench
import edit
import evaluate
import pretrained
import sample
import train_transformer
import train_vq
from lib import errors, files, terminal

# What the capital words stand for: RUN is a small run, NEW does not exist, and for the others see `folder`.

# A good command line of each script. A bad number is added to it, and the line must name the flag.
COMMANDS = {
    train_vq: "--run NEW",
    train_transformer: "--run NEW --vqgan RUN/vqgan.pt",
    sample: "--run RUN",
    evaluate: "--run RUN",
    bench: "--preset shapes",
    edit: "PHOTO --run RUN --inpaint centre",
}
BAD_NUMBERS = {
    train_vq: [
        "--steps 0", "--steps -3", "--steps 1.5", "--steps many", "--batch 0", "--batch -1", "--filters 0",
        "--groups 0", "--res-blocks 0", "--codebook-size 0", "--codebook-dim 0", "--disc-width 0",
        "--disc-max-width 0", "--micro-batch 0", "--image-size 0", "--lr -1", "--lr nan", "--lr inf",
        "--disc-lr -0.1", "--beta1 1", "--warmup -1", "--ema 1.5", "--ema -0.1", "--gan-start 2", "--gan-ramp 0",
        "--r1 -1", "--r1-every 0", "--entropy -1", "--adversarial -1", "--reconstruction nan",
        "--perceptual-weight -1", "--codebook-lr -1", "--save-every 0", "--picture-every 0", "--log-every 0",
        "--workers -1", "--seed -1", f"--seed {2 ** 63}", "--seed x", "--max-pixels 0", "--dry-run 0", "--multipliers 0", "--levels 2",
    ],
    train_transformer: [
        "--steps 0", "--batch 0", "--dim 0", "--depth 0", "--heads 0", "--dropout 1.5", "--dropout -1",
        "--class-dropout 7", "--label-smoothing 2", "--muon-lr -1", "--weight-decay -1", "--cache-tokens -1",
        "--save-every 0", "--evaluate-every -1", "--evaluate-num 0", "--log-every 0", "--ema 7",
    ],
    sample: [
        "--num 0", "--num -2", "--num 1e3", "--steps 0", "--temperature -1", "--choice-temperature nan", "--top-k 0",
        "--cfg -1", "--seed -1", f"--seed {2 ** 63}", f"--num 1{400 * '0'}",
    ],
    evaluate: [
        "--num -1", "--batch 0", "--seeds 0", "--ablate-steps 0", "--classifier-steps -1", "--steps 0", f"--seed {2 ** 63}",
    ],
    bench: [
        "--batch 0", "--repeats 0",
    ],
    edit: [
        "--num 0", "--extrapolate 0", "--feather -1", "--start-step -1", f"--seed {2 ** 63}",
    ],
}
# The script, the whole command line, and a word that the line must hold.
OTHERS = [
    (train_vq, "--run NEW --gan-loss wasserstein", "hinge"),
    (train_vq, "--run NEW --bf16 maybe", "yes or no"),
    (train_vq, "--run NEW --device abacus", "cpu"),
    (train_vq, "--run NEW --data nowhere", "nowhere"),
    (train_vq, "--run NEW --data imagenet --groups 1", "n01440764"),
    (train_vq, "--run NEW --data places2 --groups 1", "365"),
    (train_vq, "--run NEW --data EMPTY", "no images"),
    (train_transformer, "--run NEW --data nowhere --dry-run 1", "'nowhere' is no data set and no folder"),
    (train_vq, "--run NEW --data TEXT", "TEXT"),
    (train_vq, "--run NEW --data cifar10 --image-size 64", "32 pixels"),
    (train_vq, "--run NEW --multipliers 1 1 1 1 1 1 1", "stride"),
    (train_vq, "--run NEW --filters 8 --groups 3", "groups"),
    (train_vq, "--run NEW --batch 8 --micro-batch 3", "--batch 8"),
    (train_vq, "--run NEW --init NEW", "does not exist"),
    (train_vq, "--run NEW --perceptual lpips --image-size 12", "at least 16 pixels"),
    (train_vq, "--run RUN --resume --overwrite", "not allowed with"),
    (train_vq, "--run NEW --preset huge", "shapes"),
    (train_vq, "--run RUN", "no vqgan.resume.pt to resume from: use --overwrite"),
    (train_vq, "--run TEXT", "cannot write"),
    (train_transformer, "--run NEW", "does not exist"),
    (train_transformer, "--run RUN", "damaged"),
    (train_transformer, "--run RUN --resume", "use --overwrite"),
    (train_transformer, "--run RUN --overwrite --vqgan OTHER.pt --evaluate-every 1 --classifier-steps 0", "inception"),
    (train_transformer, "--run NEW --vqgan TEXT", "not a checkpoint"),
    (train_transformer, "--run NEW --vqgan EMPTY", "cannot read EMPTY"),
    (train_transformer, "--run NEW --vqgan LIGHTNING.ckpt", "not Lightning's .ckpt"),
    (train_transformer, "--run NEW --vqgan SAFE.safetensors", "not .safetensors"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --dim 10 --heads 3", "heads"),
    (train_transformer, "--run NEW --vqgan RUN/transformer.pt", "vqgan is needed"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --schedule nonsense", "cosine"),
    (train_transformer, "--run NEW --vqgan RUN/vqgan.pt --image-size 33", "divisible"),
    (sample, "--run NEW", "does not exist"),
    (sample, "--run RUN --class 99", "0 to 9"),
    (sample, "--run RUN --class unicorn", "unicorn"),
    (sample, "--run RUN --steps 65", "64"),
    (sample, "--run RUN --top-k 33", "32"),
    (sample, "--run RUN --cfg 2", "--class-dropout"),
    (sample, "--run RUN --accept 0.7", "0.5"),
    (sample, "--run RUN --num 100000000", "GB"),
    (sample, "--run RUN --out NEW/x.txt", ".png"),
    (sample, "--run RUN --schedule nonsense", "cosine"),
    (sample, "--run RUN --order alphabetic", "halton"),
    (sample, "--run RUN --decoder autoregressive", "does not exist"),
    (sample, "--run RUN --vqgan TEXT", "not a checkpoint"),
    (edit, "PHOTO --run RUN", "one of the arguments"),
    (edit, "NEW/photo.png --run RUN --inpaint centre", "photo.png"),
    (edit, "TRUNCATED --run RUN --inpaint centre", "not a readable image"),
    (edit, "TEXT --run RUN --inpaint centre", "not a readable image"),
    (edit, "PHOTO --run RUN --box 1,2,3", "TOP,LEFT"),
    (edit, "PHOTO --run RUN --box 0,0,999,999", "outside"),
    (edit, "PHOTO --run RUN --mask ODD", "same size"),
    (edit, "PHOTO --run RUN --outpaint right=2", "fraction"),
    (edit, "PHOTO --run RUN --extrapolate 20", "wider"),
    (edit, "PHOTO --run RUN --inpaint centre --class unicorn", "unicorn"),
    (edit, "PHOTO --run RUN --inpaint edges", "centre"),
    (evaluate, "--run RUN --num 2", "images"),
    (evaluate, "--run NEW", "does not exist"),
    (evaluate, "--run RUN --classifier-steps 0", "--features inception"),
    (evaluate, "--run RUN --sweep nothing", "cfg"),
    (bench, "--preset gigantic", "imagenet256"),
    (bench, "--rows everything", "decode"),
    (bench, "--preset shapes --json EMPTY", "cannot write EMPTY"),
    (pretrained, "imagenet1024", "imagenet256"),
    (pretrained, "", "no model"),
    (pretrained, "--half RUN RUN", "already there"),
]


CASES = [(script, f"{COMMANDS[script]} {bad}", bad.split()[0]) for script in BAD_NUMBERS for bad in BAD_NUMBERS[script]]
CASES += OTHERS


@pytest.fixture(scope="module")
def folder(untrained, tmp_path_factory):
    """Makes the folder that the command lines are run in."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(untrained, folder / "RUN")
    (folder / "RUN" / "autoregressive.pt").unlink()
    (folder / "RUN" / "transformer.resume.pt").write_text("damaged")
    other = files.load_checkpoint(folder / "RUN" / "vqgan.pt", "vqgan")
    other["model"]["decoder.layers.0.weight"] += 1
    files.save_checkpoint(folder / "OTHER.pt", other)
    (folder / "EMPTY").mkdir()
    (folder / "TEXT").write_text("this is no picture")
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(folder / "PHOTO", format="png")
    Image.new("L", (10, 10), 255).save(folder / "ODD", format="png")
    (folder / "TRUNCATED").write_bytes((folder / "PHOTO").read_bytes()[:80])
    torch.save({"pytorch-lightning_version": "2.0", "state_dict": {"x": torch.ones(2)}}, folder / "LIGHTNING.ckpt")
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "SAFE.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return folder


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("script, arguments, word", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_bad_input_ends_in_one_line(script, arguments, word, folder, call_main):
    tiny = {train_vq: TINY_VQ, train_transformer: TINY_TRANSFORMER}.get(script, [])
    before = contents(folder)
    line = call_main(script, folder, *tiny, *arguments.split(), code=2)
    assert line.startswith("error: ") and word in line and len(line.splitlines()) == 1, line
    assert contents(folder) == before


# ---- what command_line() makes of an error

def test_an_error_of_ours_keeps_its_traceback():
    def main():
        raise ValueError("not enough values to unpack")
    with pytest.raises(ValueError, match="unpack"):
        errors.command_line(main)


@pytest.mark.parametrize("error, remedy", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "--micro-batch"),
    (MemoryError("Unable to allocate 7.00 GiB for an array"), "--micro-batch"),
    (errors.UserError("a process that reads images died (OSError Cannot allocate memory): lower --workers"), "--workers"),
])
def test_a_lack_of_memory_ends_in_one_line(error, remedy, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        errors.command_line(main)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert remedy in printed and len(printed.splitlines()) == 1


def test_the_limit_of_a_container_is_its_memory(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("max\n")
    monkeypatch.setattr(errors, "CONTAINER_LIMITS", [tmp_path / "max", tmp_path / "missing"])
    assert errors.memory() > 1e8
    (tmp_path / "max").write_text("67108864\n")
    assert errors.memory() == 67108864


def test_an_error_has_a_line_of_its_own(monkeypatch, capsys):
    """Also if it comes while a line of progress is on the terminal."""
    def main():
        terminal.show_line("step 1/9")
        raise errors.UserError("the disk is full")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1)
    monkeypatch.setattr(os, "get_terminal_size", lambda fileno: os.terminal_size((80, 24)))
    with pytest.raises(SystemExit):
        errors.command_line(main)
    assert capsys.readouterr().out == "\r" + "step 1/9".ljust(79) + "\n"


@pytest.mark.parametrize("sentence", ["stopped by Ctrl-C", "stopped: what is measured is kept"])
def test_ctrl_c_prints_a_sentence(sentence, capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        errors.command_line(main, sentence)
    assert end.value.code == 130
    assert capsys.readouterr().err == f"\n{sentence}\n"


def test_an_unknown_user_without_a_home_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("MASKGIT_CACHE")
    monkeypatch.setattr(files.Path, "home", no_home)
    with pytest.raises(errors.UserError, match="no home folder.*MASKGIT_CACHE"):
        files.cache_folder()
