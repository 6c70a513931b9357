"""Draws images with a trained run: parallel decoding (§3.3) of tokens, then the tokenizer's decoder.

    python sample.py --steps 8 --schedule cosine                # the newest run, a row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                     # also the decoding steps, as a strip and a GIF
    python sample.py --compare                                  # beside the autoregressive decoder of the same run

edit.py does the same with a photo of which a part is kept.
"""
import argparse
import time

import torch

from lib import devices
from lib.checkpoints import add_run_flags, add_sampler_flags, load_run, sampler_options
from lib.data import find_class
from lib.pictures import Progress, grid, picture_path, restore, save_film, save_image
from maskgit import ORDERS, SCHEDULES, MaskGIT, decode, decode_sequential
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


def timed_draw(args, machine, tokenizer, transformer, labels, film):
    """draw() as the flags say -> its frames, on the CPU, and the seconds that it took."""
    started = time.time()
    with machine.autocast():
        _, frames = draw(tokenizer, transformer, machine.put(labels), film=film,
                         generator=machine.generator(args.seed), **sampler_options(args, transformer.config))
    machine.sync()
    return [frame.cpu() for frame in frames], time.time() - started


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
    devices.check_memory(size, f"--num {args.num}")
    labels = torch.tensor(classes).repeat_interleave(args.num)
    frames, seconds = timed_draw(args, machine, tokenizer, transformer, labels, args.film)
    if not machine.leads:
        return
    save_image(out, grid(frames[-1].split(args.num), [names[label] for label in classes]))
    print(f"wrote {out}: {len(labels)} images in {seconds:.1f} s")
    if args.film:
        save_film(out, [frame[::args.num] for frame in frames])                      # it shows one image of each class


def compare(args, machine):
    """Figure 2: sequential and parallel decoding of the same class, at eight moments of each; and their times."""
    models = {}
    for what, decoder in (("sequential", "autoregressive"), ("parallel", "parallel")):
        folder, tokenizer, models[what], checkpoint = load_run(args.run, machine, VQGAN, MaskGIT, args.vqgan, decoder)
    out, names = picture_path(args.out or folder / "compare.png"), checkpoint["classes"]
    label = find_class(args.classes[0], names) if args.classes else 0
    config = models["parallel"].config
    N, steps = config.num_tokens, args.steps or config.default_steps
    if machine.leads:
        print(f"{folder}: compare, {steps} steps, {args.schedule} schedule, seed {args.seed}, on {machine.device}",
              flush=True)
    shown_steps = sorted({max(1, round(i * steps / 8)) for i in range(1, 9)})                 # all, if fewer than eight
    rows, captions = [], []
    for what, passes in (("sequential", N), ("parallel", steps)):
        frames, seconds = timed_draw(args, machine, tokenizer, models[what], torch.full((args.num,), label), film=True)
        if machine.leads:
            print(f"{what}: {passes} passes, {seconds:.2f} s for {args.num} images")
        if what == "parallel":
            frames = [frames[step - 1] for step in shown_steps]
        images = torch.stack(frames, 1)[:2]
        rows += images
        captions += [f"{what}, {passes} passes"] * len(images)
    if machine.leads:
        titles = [f"{round(i * N / 8)} | {step}" for i, step in enumerate(shown_steps, 1)]
        save_image(out, grid(rows, captions, titles=titles))
        print(f"wrote {out}: {names[label]}, after as many passes of each as the titles say")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    devices.add_flags(parser, {
        "class": ({"nargs": "+", "metavar": "NAME_OR_ID", "dest": "classes"}, None,
                  "classes to draw, a row each (default: the first ten)"),
        "num": (devices.count, 8, "images of each class"),
        "film": ({"action": "store_true"}, None, "also write the decoding steps as a film strip and a GIF"),
        "compare": ({"action": "store_true"}, None,
                    "parallel beside sequential decoding, as a film strip, for one class"),
        "out": (str, None, "the picture to write (default: samples.png or compare.png in the run's folder)")})
    add_sampler_flags(parser.add_argument_group("the sampler"), SCHEDULES, ORDERS)
    devices.add_machine_flags(parser, compiles=False)
    args = parser.parse_args()
    devices.launch(compare if args.compare else sample, args)


if __name__ == "__main__":
    devices.command_line(main)
