"""Draws images by class with a trained run: parallel decoding of tokens (§3.2), then the tokenizer.

    python sample.py --steps 8 --schedule cosine            # the newest run, one row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                 # also the steps, as a strip and a GIF
    python sample.py --files DIR --num 5000                 # each image as DIR/CLASS/00000.png
    torchrun --nproc_per_node 8 -- sample.py --run runs/imagenet --files DIR --num 50

On a CPU, image k of a class depends on the seed, the class and k alone, not on what is drawn beside
it; on a GPU, rounding may depend on the batch. edit.py repaints a part of a photo; demo.py shows
the decoding in a browser.
"""
import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib import flags, pictures, runtime
from lib.data import find_class
from lib.errors import UserError, check_memory, command_line
from lib.features import read_classifier
from lib.files import fingerprint
from lib.sample_files import BATCH, claim_folder, class_folders, read_row, write_missing
from lib.sampling import (
    ACCEPT_FLAG,
    DECODER_FLAG,
    PARALLEL_FLAGS,
    RUN_FLAGS,
    Sampler,
    add_sampler_flags,
    draw_step,
    load_run,
    sampler_settings,
)
from lib.terminal import Progress
from sequential import CausalTransformer
from vqgan import as_grid

FLAGS = {
    "class": ({"nargs": "+", "metavar": "NAME_OR_ID", "dest": "classes"}, None,
              "classes to draw, one row each (default: the first ten; with --files all)"),
    "num": (flags.count, 8, "images of each class"),
    **ACCEPT_FLAG,
    "film": ({"action": "store_true"}, None,
             "also write the decoding steps, of each class's first image, as a strip and a GIF"),
    "files": ({"metavar": "FOLDER"}, None,
              "also write each image as FOLDER/CLASS/00000.png; those that are there are kept"),
    "out": (str, None, "the picture to write (default: samples.png in the run's folder; of "
                       "example/, in the working folder)"),
}
GRID_PIXELS = 16_000_000        # with --files, a larger grid is left out: it would fill the memory


def choose_classes(args: argparse.Namespace, names: list[str]) -> list[int]:
    """Returns the labels to draw, each only once. Raises UserError if --class names no class."""
    if args.classes:
        labels = [find_class(text, names) for text in args.classes]
        return list(dict.fromkeys(labels))
    if args.files:
        return list(range(len(names)))
    return list(range(min(10, len(names))))


def check_flags(args: argparse.Namespace, transformer: torch.nn.Module) -> None:
    """Raises UserError for flags that do not suit the transformer or one another."""
    if isinstance(transformer, CausalTransformer):
        flags.refuse_useless(args, PARALLEL_FLAGS, "with an autoregressive decoder")
    if args.accept < 1 and args.film:
        raise UserError("--accept chooses among several images, and --film shows the steps of one: "
                        "leave one of them out")


def check_grid(args: argparse.Namespace, layout: pictures.GridLayout, num_classes: int,
               image_size: int, out: Path) -> None:
    """Raises UserError if the grid is too large for its format or for the memory."""
    pictures.check_picture(out, layout.size, "a lower --num")
    width, height = layout.size
    floats = 3 * image_size ** 2 * args.num * num_classes
    # The images as floats of 4 bytes, twice while their batches are joined, and the grid.
    check_memory(2 * 4 * floats + 3 * width * height, f"--num {args.num}")


def check_film(num_steps: int, num_classes: int, image_size: int) -> None:
    """Raises UserError if the steps of an image of each class would fill the memory."""
    floats = 3 * image_size ** 2 * num_classes * num_steps
    # As floats of 4 bytes, twice while their batches are joined.
    check_memory(2 * 4 * floats, "--film", "name fewer classes with --class")


def open_classifier(folder: Path, checkpoint: dict, machine: runtime.Machine) -> torch.nn.Module:
    """Returns the run's classifier, for --accept. Raises UserError if it is not there."""
    path = folder / "classifier.pt"
    if not path.exists():
        raise UserError(f"--accept needs {path}, which does not exist: "
                        f"python evaluate.py --run {folder} trains it")
    return read_classifier(path, checkpoint["classes"], checkpoint["image_size"], machine)


def draw(sampler: Sampler, labels: Tensor, numbers: Tensor) -> Tensor:
    """Draws the images of these classes and numbers k, BATCH at a time.

    labels, numbers: (n,) int64 on the CPU. Returns (n, 3, H, W) in [0, 1] on the CPU."""
    progress = Progress("drawing", len(labels))
    images = []
    for batch in torch.arange(len(labels)).split(BATCH):
        tokens = sampler.draw(labels[batch], numbers[batch])
        images.append(sampler.images(tokens).cpu())
        if sampler.machine.leads and len(labels) > BATCH:
            progress.show(sum(map(len, images)))
    return torch.cat(images)


def save_grid(machine: runtime.Machine, out: Path, rows: Sequence[Tensor], captions: list[str],
              started: float) -> None:
    """Writes a grid, with a row (n, 3, H, W) for each caption, on the first rank.

    started: when drawing began, as time.time()."""
    seconds = time.time() - started
    if machine.leads:
        pictures.save_image(out, pictures.grid(rows, captions))
        number = sum(map(len, rows))
        print(f"wrote {out}: {number} image{'s' * (number > 1)} in {seconds:.1f} s")


def draw_film(sampler: Sampler, labels: Tensor) -> tuple[list[Tensor], list[str]]:
    """Draws image 0 of each class (n,) again, and returns its steps and their titles.

    A step is a tensor (n, 3, H, W) on the CPU, with grey over what is masked again."""
    if isinstance(sampler.transformer, CausalTransformer):
        num_tokens = sampler.transformer.config.num_tokens
        moments = sorted({math.ceil(i / 8 * num_tokens) for i in range(1, 9)})
        titles = [f"{t} tokens" for t in moments]
        opacity = 1.0                   # hides what is not decoded yet: it is arbitrary
    else:
        moments = list(range(1, sampler.options["steps"] + 1))
        titles = [f"step {t}" for t in moments]
        opacity = 0.85
    sampled_at = {t: [] for t in moments}               # by step: a tensor for each batch
    masked_at = {t: [] for t in moments}

    def keep(t: int, sampled: Tensor, masked: Tensor, confidence: Tensor) -> None:
        if t in sampled_at:
            sampled_at[t].append(as_grid(sampled))
            masked_at[t].append(as_grid(masked))

    for batch in labels.split(BATCH):
        sampler.decode(batch, torch.zeros_like(batch), keep)
    frames = []
    with sampler.machine.autocast():
        for t in moments:
            sampled = torch.cat(sampled_at[t])
            masked = torch.cat(masked_at[t])
            frames.append(draw_step(sampler.tokenizer, sampled, masked, opacity, BATCH))
    return frames, titles


def draw_files(
    args: argparse.Namespace, sampler: Sampler, names: list[str], labels: Tensor, numbers: Tensor,
) -> list[Path]:
    """Draws those images that the folder of --files lacks. Returns the folder of each class.

    names: of all classes, by label. labels, numbers: of the images, (n,). Raises UserError if the
    folder holds images of another model, seed, sampler or kind of device."""
    started = time.time()
    settings = sampler_settings(args, sampler.transformer)
    settings["seed"] = args.seed
    settings["device"] = sampler.machine.device.type
    settings["tokenizer"] = fingerprint(sampler.tokenizer)
    settings["transformer"] = fingerprint(sampler.transformer)
    if sampler.classifier is not None:
        settings["classifier"] = fingerprint(sampler.classifier)
    claim_folder(Path(args.files), sampler.machine, settings)
    folders = class_folders(Path(args.files), names)
    write_missing(sampler, labels, numbers, folders)
    if sampler.machine.leads:
        print(f"{args.files}: all {len(labels)} images are there, in {time.time() - started:.1f} s")
    return folders


def sample(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Draws images of each class: as a grid, as single files, as a film.

    Ranks share the single files. They all draw the rest, and the first one writes it."""
    folder, tokenizer, transformer, checkpoint = load_run(
        args.run, machine, args.vqgan, args.decoder)
    check_flags(args, transformer)
    names = checkpoint["classes"]
    size = checkpoint["image_size"]
    classes = choose_classes(args, names)
    captions = [names[label] for label in classes]
    out = pictures.picture_path(args.out, folder, "samples.png")
    layout = pictures.GridLayout(args.num, len(classes), (size, size), captions)
    with_grid = not args.files or math.prod(layout.size) <= GRID_PIXELS
    if with_grid:
        check_grid(args, layout, len(classes), size, out)
    classifier = open_classifier(folder, checkpoint, machine) if args.accept < 1 else None
    sampler = Sampler(args, tokenizer, transformer, machine, classifier)
    if args.film:
        check_film(sampler.options.get("steps", 8), len(classes), size)

    method = "token by token"
    if not isinstance(transformer, CausalTransformer):
        method = f"{sampler.options['steps']} steps, {args.schedule} schedule"
    if machine.leads:
        print(f"{folder}: samples, {method}, seed {args.seed}, on {machine.device}", flush=True)
    started = time.time()
    labels = torch.tensor(classes).repeat_interleave(args.num)
    numbers = torch.arange(args.num).repeat(len(classes))
    if args.files:
        folders = draw_files(args, sampler, names, labels, numbers)
        if with_grid:
            rows = [read_row(folders[label], args.num, size) for label in classes]
            save_grid(machine, out, rows, captions, started)
        elif args.out and machine.leads:
            print(f"{out}: left out, since a grid of so many images would fill the memory")
    else:
        rows = draw(sampler, labels, numbers).split(args.num)
        save_grid(machine, out, rows, captions, started)
    if args.film:
        frames, titles = draw_film(sampler, torch.tensor(classes))
        if machine.leads:
            pictures.save_film(out, frames, titles)
    machine.sync()


def main() -> None:
    """Parses the flags and draws."""
    parser = flags.Parser(__doc__)
    flags.add_flags(parser, RUN_FLAGS | DECODER_FLAG | FLAGS)
    add_sampler_flags(parser)
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(sample, flags.parse(parser))


if __name__ == "__main__":
    command_line(main, interrupted="stopped by Ctrl-C: every picture is whole or not there; "
                               "with --files, the same command goes on")
