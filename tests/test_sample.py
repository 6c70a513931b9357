"""sample.py as a user runs it, and every bad input of its own."""
import os
import shutil

import pytest
import torch
from PIL import Image

from conftest import TINY_TRANSFORMER, TINY_VQ, refused, run


def test_newest_run_grid_and_film(trained, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    os.utime(tmp_path / "runs" / "older" / "transformer.pt", (1, 1))
    (tmp_path / "runs" / "unfinished").mkdir()
    output = run("sample.py", "--steps", 4, "--schedule", "cosine", "--num", 3, "--film", cwd=tmp_path)
    assert "runs/newer" in output
    with Image.open(tmp_path / "runs" / "newer" / "samples.png") as grid, Image.open(tmp_path / "runs" / "newer" / "samples.film.gif") as gif:
        assert grid.height > 10 * 64 and grid.width > 3 * 64
        assert gif.n_frames >= 4
    assert (tmp_path / "runs" / "newer" / "samples.film.png").exists()


def test_classes_and_seeds(trained, tmp_path):
    for name, flags in {"a": ["--class", "heart", 3], "b": ["--class", "HEART", "fish"], "c": ["--class", "hea", "3", "--seed", 1]}.items():
        run("sample.py", "--run", trained, "--num", 2, "--out", tmp_path / f"{name}.png", *flags)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("flags", [["--order", "halton"], ["--order", "random"], ["--top-k", 3, "--temperature", 0.5], ["--temperature", 0]])
def test_options(trained, tmp_path, flags):
    run("sample.py", "--run", trained, "--num", 1, "--out", tmp_path / "a.png", *flags)


def test_guidance_needs_a_null_class(trained, tmp_path):
    refused("sample.py", "--run", trained, "--cfg", 2, "--out", tmp_path / "a.png", says="--class-dropout")
    shutil.copy(trained / "vqgan.pt", tmp_path)
    run("train_transformer.py", "--run", tmp_path, *TINY_TRANSFORMER, "--class-dropout", 0.5)
    run("sample.py", "--run", tmp_path, "--cfg", 2, "--num", 1)


@pytest.mark.parametrize("flags, says", [
    (["--schedule", "quartic"], ["quartic", "cosine", "logarithmic"]),
    (["--order", "spiral"], ["spiral", "halton"]),
    (["--class", "zebra"], ["zebra", "ball"]),
    (["--class", "10"], ["10", "0 to 9"]),
    (["--class", "r"], ["several"]),
    (["--steps", 0], ["steps", "1"]),
    (["--steps", 65], ["steps", "64"]),
    (["--num", 0], ["--num"]),
    (["--top-k", 33], ["codebook, 32", "33"]),
    (["--run", "nowhere"], ["nowhere", "does not exist"]),
    (["--out", "picture.xyz"], ["picture.xyz", ".png"]),
])
def test_bad_flags(trained, tmp_path, flags, says):
    refused("sample.py", "--run", trained, "--out", tmp_path / "a.png", *flags, says=says)
    assert not list(tmp_path.iterdir())


def test_no_run_at_all(tmp_path):
    """The example beside the scripts is drawn from, and nothing can be trained on."""
    assert "/example: samples" in run("sample.py", "--steps", 2, "--num", 1, "--out", "a.png", cwd=tmp_path)
    assert (tmp_path / "a.png").exists()
    refused("train_transformer.py", says=["vqgan.pt", "does not exist"], cwd=tmp_path)


def test_an_unwritable_output(trained, tmp_path):
    (tmp_path / "file").write_text("")
    refused("sample.py", "--run", trained, "--num", 1, "--out", tmp_path / "file" / "a.png", says=["file", "--out"])


def test_broken_checkpoints(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    good = (folder / "transformer.pt").read_bytes()
    cases = {"truncated": good[:len(good) // 2], "a few bytes": good[:10], "empty": b"", "text": b"these are no weights\n" * 50,
             "other stage": (folder / "vqgan.pt").read_bytes()}
    for name, content in cases.items():
        (folder / "transformer.pt").write_bytes(content)
        refused("sample.py", "--run", folder, says=["transformer.pt", "holds a vqgan" if name == "other stage" else "not a checkpoint"])
    torch.save([1, 2], folder / "transformer.pt")
    refused("sample.py", "--run", folder, says=["transformer.pt", "not a checkpoint"])
    checkpoint = torch.load(trained / "transformer.pt", weights_only=True)
    del checkpoint["model"]["head_bias"]
    torch.save(checkpoint, folder / "transformer.pt")
    refused("sample.py", "--run", folder, says=["head_bias", "missing"])
    (folder / "transformer.pt").write_bytes(good)
    run("sample.py", "--run", folder, "--num", 1)


def test_a_checkpoint_cannot_run_code(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-here",)
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    torch.save({"kind": "transformer", "x": Evil()}, folder / "transformer.pt")
    refused("sample.py", "--run", folder, says=["transformer.pt", "not a checkpoint"])
    assert not (tmp_path / "was-here").exists()


def test_another_codebook(trained, tmp_path):
    run("train_vq.py", "--run", tmp_path, *TINY_VQ, "--codebook-size", 16)
    refused("sample.py", "--run", trained, "--vqgan", tmp_path / "vqgan.pt", says=["codebook of 32", "16"])


def test_image_size_and_stride(tmp_path):
    refused("train_vq.py", "--data", tmp_path, "--run", tmp_path, *TINY_VQ, "--image-size", 30, says=["30", "stride 4"])
    refused("train_vq.py", "--run", tmp_path, *TINY_VQ, "--image-size", 64, says=["shapes", "32"])
