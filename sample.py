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
from lib.pictures import Progress, grey_out, grid, picture_path, save_film, save_image
from maskgit import ORDERS, SCHEDULES, MaskGIT, decode, decode_sequential
from vqgan import VQGAN, as_grid, to_pixels


@torch.no_grad()
def draw(tokenizer, transformer, labels, batch=64, film=False, **options):
    """Tokens of the classes asked for, then their images, `batch` at a time.

    labels: (n,) int64. options: as for decode(), or for decode_sequential() where the transformer is causal. Returns
    images (n, 3, H, W) in [0, 1] and a list of frames of the same shape, the last of which are these images. With film,
    those before it show what is predicted after each step, the tokens that stay masked greyed out."""
    frames_of_batches, progress, done = [], Progress("drawing", len(labels)), 0
    for part in labels.split(batch):
        if transformer.config.causal:
            steps, grey = sequential_steps(decode_sequential(transformer, part, **options)), 1.0
        else:
            steps, grey = decode(transformer, part, return_steps=True, **options)[1], 0.85
        shown = steps if film else steps[-1:]
        frames_of_batches.append([show_step(tokenizer, predicted, masked, grey) for predicted, masked in shown])
        done += len(part)
        if len(labels) > batch:
            progress.show(done)
    frames = [torch.cat(parts) for parts in zip(*frames_of_batches)]
    return frames[-1], frames


def sequential_steps(tokens):
    """Tokens (B, N), decoded in raster order -> as decode() returns its steps: (tokens, mask of those not decoded yet),
    both (B, N), at eight moments."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return [(tokens, (places >= round(i * tokens.shape[1] / 8)).expand_as(tokens)) for i in range(1, 9)]


def show_step(tokenizer, predicted, masked, grey):
    """Predicted tokens (B, N) as images (B, 3, H, W), a share `grey` of grey over those in the mask (B, N)."""
    return grey_out(tokenizer.decode(as_grid(predicted)), to_pixels(as_grid(masked), tokenizer.config.stride), grey)


def announce(args, machine, folder, what, options):
    """The first line that is printed: which run draws, and how."""
    how = f"{options['steps']} steps, {args.schedule} schedule" if "steps" in options else "token by token"
    if machine.leads:
        print(f"{folder}: {what}, {how}, seed {args.seed}, on {machine.device}", flush=True)


def sample(args, machine):
    """Draws a row of images for each class. Every rank draws the same, and the first one writes it."""
    folder, tokenizer, transformer, checkpoint = load_run(args.run, machine, VQGAN, MaskGIT, args.vqgan,
                                                          args.decoder)
    out, names = picture_path(args.out or folder / "samples.png"), checkpoint["classes"]
    classes = [find_class(text, names) for text in args.classes] if args.classes else list(range(min(10, len(names))))
    options = sampler_options(args, transformer.config)
    announce(args, machine, folder, "samples", options)

    started, count = time.time(), len(classes) * args.num
    # Floats, while they are drawn, copied and made one picture; with --film at each step.
    devices.check_memory(40 * count * checkpoint["image_size"] ** 2 * (9 if args.film else 1), f"--num {args.num}")
    labels = machine.put(torch.tensor(classes).repeat_interleave(args.num))
    with machine.autocast():
        images, frames = draw(tokenizer, transformer, labels, film=args.film, generator=machine.generator(args.seed),
                              **options)
    machine.sync()
    images, frames = images.cpu(), [frame.cpu() for frame in frames]
    seconds = time.time() - started
    if not machine.leads:
        return
    save_image(out, grid(list(images.split(args.num)), [names[label] for label in classes]))
    print(f"wrote {out}: {len(images)} images in {seconds:.1f} s")
    if args.film:
        strip, gif = save_film(out, [frame[::args.num] for frame in frames])         # it shows one image of each class
        print(f"wrote {strip} and {gif}")


def compare(args, machine):
    """Figure 2: sequential and parallel decoding of the same class, at eight moments of each; and their times."""
    models = {}
    for what, decoder in (("sequential", "autoregressive"), ("parallel", "parallel")):
        folder, tokenizer, models[what], checkpoint = load_run(args.run, machine, VQGAN, MaskGIT, args.vqgan,
                                                               decoder)
    out, names = picture_path(args.out or folder / "compare.png"), checkpoint["classes"]
    label = find_class(args.classes[0], names) if args.classes else 0
    labels = machine.put(torch.full((args.num,), label))
    options = sampler_options(args, models["parallel"].config)
    announce(args, machine, folder, "compare", options)

    steps, N = options["steps"], models["parallel"].config.num_tokens
    passes = {"sequential": N, "parallel": steps}
    shown_steps = [round(i * steps / 8) for i in range(1, 9)] if steps >= 8 else range(1, steps + 1)
    rows, captions = [], []
    for what, model in models.items():
        started = time.time()
        with machine.autocast():
            _, frames = draw(tokenizer, model, labels, film=True, generator=machine.generator(args.seed),
                             **sampler_options(args, model.config))
        machine.sync()
        frames = [frame.cpu() for frame in frames]
        if machine.leads:
            print(f"{what}: {passes[what]} passes, {time.time() - started:.2f} s for {args.num} images")
        if what == "parallel":
            frames = [frames[step - 1] for step in shown_steps]
        for i in range(min(2, args.num)):
            rows.append(torch.stack([frame[i] for frame in frames]))
            captions.append(f"{what}, {passes[what]} passes")
    if machine.leads:
        titles = [f"{round((i + 1) * N / 8)} | {step}" for i, step in enumerate(shown_steps)]
        save_image(out, grid(rows, captions, titles=titles))
        print(f"wrote {out}: {names[label]}, after as many passes of each as the titles say")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser)
    parser.add_argument("--class", dest="classes", nargs="+", metavar="NAME_OR_ID",
                        help="classes to draw, a row each (default: the first ten)")
    parser.add_argument("--num", type=devices.count, default=8, help="images of each class (default: %(default)s)")
    parser.add_argument("--film", action="store_true", help="also write the decoding steps as a film strip and a GIF")
    parser.add_argument("--compare", action="store_true",
                        help="parallel beside sequential decoding, as a film strip, for one class")
    parser.add_argument("--out", help="the picture to write (default: samples.png or compare.png in the run's folder)")
    add_sampler_flags(parser.add_argument_group("the sampler"), SCHEDULES, ORDERS)
    devices.add_machine_flags(parser, compiles=False)
    args = parser.parse_args()
    devices.launch(compare if args.compare else sample, args)


if __name__ == "__main__":
    devices.command_line(main)
