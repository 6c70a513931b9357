"""Draws images with a trained run: parallel decoding (§3.3) of tokens, then the tokenizer's decoder.

    python sample.py --steps 8 --schedule cosine                # the newest run, a row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                     # also the decoding steps, as a strip and a GIF

edit.py does the same with a photo of which a part is kept; demo.py shows each step, and both decoders side by side.
"""
import argparse
import time

import torch

from lib import flags, runtime
from lib.data import find_class
from lib.pictures import grid, picture_path, restore, save_film, save_image
from lib.sampling import add_run_flags, add_sampler_flags, load_run, sampler_options
from lib.terminal import Progress
from maskgit import SCHEDULES, MaskGIT, decode, decode_sequential
from vqgan import VQGAN, as_grid


@torch.no_grad()
def draw(tokenizer, transformer, labels, batch=64, film=False, **options):
    """Tokens of the classes asked for, then their images, `batch` at a time.

    labels: (n,) int64. options: as for decode(), or for decode_sequential() where the transformer is causal. Returns
    images (n, 3, H, W) in [0, 1] and a list of frames of the same shape, the last of which are these images. With film,
    those before it show what is predicted after each step, the tokens that stay masked greyed out."""
    frames_of_batches, progress = [], Progress("drawing", len(labels))
    for number, part in enumerate(labels.split(batch), 1):
        if transformer.config.causal:
            # As decode() returns its steps, at eight moments: the tokens, and which of them are not decoded yet.
            tokens, grey = decode_sequential(transformer, part, **options), 1.0
            places = torch.arange(tokens.shape[1], device=tokens.device)
            steps = [(tokens, (places >= round(i * len(places) / 8)).expand_as(tokens), None) for i in range(1, 9)]
        else:
            steps, grey = decode(transformer, part, return_steps=True, **options)[1], 0.85
        frames_of_batches.append([restore(tokenizer, as_grid(predicted), as_grid(masked), grey)
                                  for predicted, masked, _ in (steps if film else steps[-1:])])
        if len(labels) > batch:
            progress.show(min(number * batch, len(labels)))
    frames = [torch.cat(parts) for parts in zip(*frames_of_batches)]
    return frames[-1], frames


def sample(args, machine):
    """Draws a row of images for each class. Every rank draws the same, and the first one writes it."""
    folder, tokenizer, transformer, checkpoint = load_run(args.run, machine, VQGAN, MaskGIT, args.vqgan, args.decoder)
    out, names = picture_path(args.out or folder / "samples.png"), checkpoint["classes"]
    classes = [find_class(text, names) for text in args.classes] if args.classes else list(range(min(10, len(names))))
    steps = args.steps or transformer.config.default_steps
    how = "token by token" if transformer.config.causal else f"{steps} steps, {args.schedule} schedule"
    if machine.leads:
        print(f"{folder}: samples, {how}, seed {args.seed}, on {machine.device}", flush=True)
    # Floats, while they are drawn, copied and made one picture; with --film at each step.
    size = 40 * len(classes) * args.num * checkpoint["image_size"] ** 2 * (9 if args.film else 1)
    flags.check_memory(size, f"--num {args.num}")
    labels, started = torch.tensor(classes).repeat_interleave(args.num), time.time()
    with machine.autocast():
        _, frames = draw(tokenizer, transformer, machine.put(labels), film=args.film,
                         generator=machine.generator(args.seed), **sampler_options(args, transformer.config))
    machine.sync()
    frames = [frame.cpu() for frame in frames]
    if not machine.leads:
        return
    save_image(out, grid(frames[-1].split(args.num), [names[label] for label in classes]))
    print(f"wrote {out}: {len(labels)} images in {time.time() - started:.1f} s")
    if args.film:
        save_film(out, [frame[::args.num] for frame in frames])                      # it shows one image of each class


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    flags.add_flags(parser, {
        "class": ({"nargs": "+", "metavar": "NAME_OR_ID", "dest": "classes"}, None,
                  "classes to draw, a row each (default: the first ten)"),
        "num": (flags.count, 8, "images of each class"),
        "film": ({"action": "store_true"}, None, "also write the decoding steps as a film strip and a GIF"),
        "out": (str, None, "the picture to write (default: samples.png in the run's folder)")})
    add_sampler_flags(parser.add_argument_group("the sampler"), SCHEDULES, ORDERS)
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(sample, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main)
