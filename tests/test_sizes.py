"""Images whose sides are no power of two, from training to evaluation."""
import numpy as np
import pytest
import torch
from conftest import TINY_TRANSFORMER, TINY_VQ
from PIL import Image

import edit
import evaluate
import sample
import train_transformer
import train_vq
from discriminator import Discriminator, r1_penalty
from lib.files import save_checkpoint


@pytest.mark.parametrize("size, end", [(8, 4), (24, 3), (48, 3), (96, 3), (100, 4), (112, 4), (224, 4), (256, 4)])
def test_the_discriminator_sees_every_pixel_at_any_size(size, end):
    torch.manual_seed(0)
    disc = Discriminator(size, width=1, max_width=4)
    shapes = []
    disc.conv_out.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[2:]))
    images = torch.rand(1, 3, size, size, requires_grad=True)
    gradient, = torch.autograd.grad(disc(images).sum(), images)
    assert gradient.abs().sum(1).min() > 0
    assert shapes == [(end, end)]
    r1_penalty(disc, images).backward()
    assert disc.conv_in.weight.grad.isfinite().all()


@pytest.mark.slow
def test_48_pixels_from_training_to_evaluation(tmp_path, call_main):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(60):
            image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            image.resize((64, 50)).save(tmp_path / "photos" / name / f"{i}.png")
    call_main(train_vq, tmp_path, "--data", "photos", "--image-size", 48, *TINY_VQ)
    call_main(train_transformer, tmp_path, "--data", "photos", *TINY_TRANSFORMER)
    call_main(sample, tmp_path, "--num", 2, "--out", "samples.png")
    call_main(edit, tmp_path, "photos/a/0.png", "--box", "0,0,30,30", "--num", 1, "--out", "edit.png")
    assert Image.open(tmp_path / "edit.1.png").size == (48, 48)
    printed = call_main(evaluate, tmp_path, "--num", 6, "--classifier-steps", 2)
    assert "PSNR" in printed and (tmp_path / "runs" / "photos" / "eval.json").exists()


@pytest.mark.parametrize("size, remedy", [(50, "choose 48 or 52"), (4, "the smallest is 8")])
def test_other_sizes_are_refused_with_the_nearest_that_work(size, remedy, tmp_path, call_main):
    said = call_main(train_vq, tmp_path, "--data", "imagenet", "--preset", "shapes", "--image-size", size, code=2)
    assert remedy in said                                       # and not that there are no images


@pytest.mark.parametrize("flags, tokens", [([], 256), (["--image-size", 32], 64)])
def test_a_run_has_the_image_size_of_the_one_that_it_starts_from(flags, tokens, untrained, tmp_path, call_main):
    checkpoint = torch.load(untrained / "vqgan.pt", weights_only=True)
    save_checkpoint(tmp_path / "vqgan.pt", checkpoint | {"image_size": 64})
    output = call_main(train_vq, tmp_path, "--init", tmp_path, "--batch", 2, "--dry-run", 1, *flags)
    assert f"{tokens} tokens of 32" in output
