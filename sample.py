"""Draws images by class with a trained run: parallel decoding of tokens (§3.3), then the tokenizer.

    python sample.py --steps 8 --schedule cosine            # the newest run, one row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                 # also the steps, as a strip and a GIF

edit.py repaints a part of a photo; demo.py shows the decoding in a browser.
"""
import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib import flags, pictures, runtime
from lib.data import find_class
from lib.sampling import (
    add_run_flags,
    add_sampler_flags,
    draw_step,
    load_run,
    sampler_of,
    sampler_options,
)
from lib.terminal import Progress
from maskgit import MaskGIT
from sequential import CausalTransformer
from vqgan import VQGAN, as_grid

FLAGS = {
    "class": ({"nargs": "+", "metavar": "NAME_OR_ID", "dest": "classes"}, None,
              "classes to draw, one row each (default: the first ten)"),
    "num": (flags.count, 8, "images of each class"),
    "film": ({"action": "store_true"}, None,
             "also write the decoding steps, of one image of each class, as a strip and a GIF"),
    "out": (str, None, "the picture to write (default: samples.png in the run's folder)"),
}
BATCH = 64                      # images decoded at once


def check_size(num: int, out: Path, captions: Sequence[str], image_size: int) -> None:
    """Raises UserError if the picture is too large for its format or for the memory."""
    layout = pictures.GridLayout(num, len(captions), (image_size, image_size), captions)
    pictures.check_picture(out, layout.size, "a lower --num")
    width, height = layout.size
    floats = 3 * image_size ** 2 * num * len(captions)
    # The images as floats of 4 bytes, twice while their batches are joined, and the grid.
    flags.check_memory(2 * 4 * floats + 3 * width * height, f"--num {num}")


@torch.no_grad()
def draw(
    tokenizer: VQGAN, transformer: MaskGIT, labels: Tensor, options: dict,
    moments: Sequence[int] = (),
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Draws an image for each label, BATCH at a time.

    labels: (n,) int64. options: of the decoding function. moments: steps t to keep for a film.
    Returns images (n, 3, H, W) in [0, 1] on the CPU; and for each moment the sampled tokens and a
    mask of those that are masked again, both (n, side, side)."""
    sampled_at = {t: [] for t in moments}               # by step: a tensor for each batch
    masked_at = {t: [] for t in moments}

    def keep(t: int, sampled: Tensor, masked: Tensor, confidence: Tensor) -> None:
        if t in sampled_at:
            sampled_at[t].append(as_grid(sampled))
            masked_at[t].append(as_grid(masked))

    sampler = sampler_of(transformer)
    progress = Progress("drawing", len(labels))
    images = []
    for batch in labels.split(BATCH):
        tokens = sampler(transformer, batch, on_step=keep if moments else None, **options)
        images.append(tokenizer.decode(as_grid(tokens)).float().cpu())
        if len(labels) > BATCH:
            progress.show(sum(map(len, images)))
    steps = [(torch.cat(sampled_at[t]), torch.cat(masked_at[t])) for t in moments]
    return torch.cat(images), steps


def sample(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Draws a row of images for each class. All ranks draw the same; the first one writes."""
    folder, tokenizer, transformer, checkpoint = load_run(
        args.run, machine, args.vqgan, args.decoder)
    names = checkpoint["classes"]
    classes = list(range(min(10, len(names))))
    if args.classes:
        classes = [find_class(text, names) for text in args.classes]
    captions = [names[label] for label in classes]
    options = sampler_options(args, transformer)
    out = pictures.picture_path(args.out, folder, "samples.png")
    check_size(args.num, out, captions, checkpoint["image_size"])

    if isinstance(transformer, CausalTransformer):
        method = "token by token"
        moments = [round(i / 8 * transformer.config.num_tokens) for i in range(1, 9)]
        titles = [f"{t} tokens" for t in moments]
        opacity = 1.0                   # hides what is not decoded yet: it is arbitrary
    else:
        method = f"{options['steps']} steps, {args.schedule} schedule"
        moments = list(range(1, options["steps"] + 1))
        titles = [f"step {t}" for t in moments]
        opacity = 0.85
    if machine.leads:
        print(f"{folder}: samples, {method}, seed {args.seed}, on {machine.device}", flush=True)
    started = time.time()
    labels = torch.tensor(classes).repeat_interleave(args.num)
    options["generator"] = machine.generator(args.seed)
    if not args.film:
        moments = []
    with machine.autocast():
        images, steps = draw(tokenizer, transformer, machine.put(labels), options, moments)
        frames = []
        for sampled, masked in steps:                               # one image of each class
            frames.append(draw_step(
                tokenizer, sampled[::args.num], masked[::args.num], opacity, BATCH))
    machine.sync()
    if not machine.leads:
        return
    pictures.save_image(out, pictures.grid(images.split(args.num), captions))
    print(f"wrote {out}: {len(labels)} images in {time.time() - started:.1f} s")
    if args.film:
        pictures.save_film(out, frames, titles)


def main() -> None:
    """Parses the flags and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    flags.add_flags(parser, FLAGS)
    add_sampler_flags(parser.add_argument_group("the sampler"))
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(sample, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main, interrupted="stopped by Ctrl-C: nothing was written")
