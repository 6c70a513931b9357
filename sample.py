"""Draws images with a trained run: parallel decoding (§3.3) of tokens, then the tokenizer's decoder.

    python sample.py --steps 8 --schedule cosine                # the newest run, a row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                     # also the decoding steps, as a strip and a GIF
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import devices
import runtime
from maskgit import ORDERS, SCHEDULES, MaskGIT, MaskGITConfig, decode, decode_sequential
from vqgan import VQGAN, VQGANConfig


def load_tokenizer(path):
    """runs/NAME/vqgan.pt -> (VQGAN, checkpoint)."""
    return runtime.rebuild(path, "vqgan", VQGANConfig, VQGAN)


STAGES = {"parallel": "transformer", "autoregressive": "autoregressive"}           # by decoder: the name of its file


def load_run(folder, device, vqgan=None, decoder=None):
    """Both models of a run (None: the newest), on `device` -> (folder, VQGAN, MaskGIT, the transformer's checkpoint).

    vqgan: another tokenizer file. decoder: one of STAGES; None: parallel, but in a run that holds only the other.

    Raises ValueError where they do not belong together: another codebook, another grid, or a tokenizer that was
    trained again after the transformer."""
    folder = Path(folder) if folder else newest_run()
    path = Path(vqgan or folder / "vqgan.pt")
    alone = not (folder / "transformer.pt").exists() and (folder / "autoregressive.pt").exists()
    stage = STAGES[decoder or ("autoregressive" if alone else "parallel")]
    transformer, checkpoint = runtime.rebuild(folder / f"{stage}.pt", stage, MaskGITConfig, MaskGIT)
    tokenizer, _ = load_tokenizer(path)
    ours, theirs = tokenizer.config.codebook_size, transformer.config.codebook_size
    if ours != theirs:
        raise ValueError(f"{folder}/{stage}.pt was made for a codebook of {theirs}, but {path} has {ours} entries")
    if runtime.fingerprint(tokenizer) != checkpoint["tokenizer"]:
        raise ValueError(f"{path} is not the tokenizer that {folder}/{stage}.pt was trained with (it was trained again "
                         f"later?): run train_transformer.py again, or name the right file with --vqgan")
    return folder, tokenizer.to(device), transformer.to(device), checkpoint


def newest_run(root="runs"):
    """The folder whose transformer was written last; the example beside this file where there is none.

    Raises FileNotFoundError where that is missing too."""
    files = [path for stage in STAGES.values() for path in Path(root).glob(f"*/{stage}.pt")]
    files = sorted(files, key=lambda path: path.stat().st_mtime) or list(Path(__file__).parent.glob("example/transformer.pt"))
    if not files:
        raise FileNotFoundError(f"no run in {root}/ holds a transformer: run train_vq.py and train_transformer.py, or pretrained.py imagenet256, "
                                f"or name a run with --run")
    return files[-1].parent


def find_class(text, classes):
    """A class's id, or any unambiguous part of its name -> its index. Raises ValueError."""
    if text.isdigit():
        if int(text) < len(classes):
            return int(text)
        raise ValueError(f"class {text} does not exist: this run has classes 0 to {len(classes) - 1}")
    exact = [i for i, name in enumerate(classes) if name.lower() == text.lower()]
    found = exact or [i for i, name in enumerate(classes) if text.lower() in name.lower()]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(classes[i] for i in (found or range(len(classes)))[:12])
    raise ValueError(f"class '{text}' fits several: {shown}" if found else
                     f"unknown class '{text}'; this run has {shown}{', ...' if len(classes) > 12 else ''}")


def draw(tokenizer, transformer, labels, batch=64, known=None, **options):
    """decode() (or decode_sequential(), for a causal transformer) and the tokenizer's decoder, in batches.

    labels: (n,). known: (n, N) or None. options: as for the decoding function.
    Returns images (n, 3, H, W), and a list of (images of the prediction, pixel mask (n, 1, H, W)), one pair a step,
    empty unless return_steps is among the options."""
    images, history = [], []
    side, stride = math.isqrt(transformer.config.num_tokens), tokenizer.config.stride
    for start in range(0, len(labels), batch):
        part = labels[start:start + batch]
        if transformer.config.causal:
            tokens, steps = decode_sequential(transformer, part, **options), []
        else:
            given = None if known is None else known[start:start + batch]
            result = decode(transformer, part, known=given, **options)
            tokens, steps = result if options.get("return_steps") else (result, [])
        images.append(restore(tokenizer, tokens))
        history.append([(restore(tokenizer, predicted), F.interpolate(mask.view(-1, 1, side, side).float(), scale_factor=stride))
                        for predicted, mask in steps])
    return torch.cat(images), [tuple(map(torch.cat, zip(*step))) for step in zip(*history)]


@torch.no_grad()
def restore(tokenizer, tokens):
    """Tokens (B, N) of a square grid -> images (B, 3, H, W)."""
    side = math.isqrt(tokens.shape[1])
    return tokenizer.decode(tokens.view(-1, side, side))


def save_film(path, history):
    """The decoding steps, tokens still masked in grey: a strip (a row an image) and a GIF beside `path`.

    history: as draw() returns it. Returns the paths of both."""
    frames = [predicted * (1 - 0.85 * mask) + 0.5 * 0.85 * mask for predicted, mask in history]   # each (n, 3, H, W)
    strip, gif = path.with_suffix(".film.png"), path.with_suffix(".film.gif")
    rows = [torch.stack([frame[i] for frame in frames]) for i in range(min(8, len(frames[0])))]
    runtime.save_image(strip, runtime.grid(rows, titles=[f"step {t + 1}" for t in range(len(frames))]))
    across = math.isqrt(len(frames[0]) - 1) + 1
    pages = [runtime.grid(list(frame.split(across))) for frame in frames]
    runtime.save_image(gif, pages[0], save_all=True, append_images=pages[1:] + pages[-1:] * 4, duration=350, loop=0)
    return strip, gif


def sample(args, machine):
    if args.num < 1:
        raise ValueError("--num must be at least 1")
    device = machine.device
    folder, tokenizer, transformer, checkpoint = load_run(args.run, device, args.vqgan)
    names = checkpoint["classes"]
    rows = [find_class(text, names) for text in args.classes] if args.classes else list(range(min(10, len(names))))
    out = Path(args.out or folder / "samples.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out} must end in .png, .jpg or .webp")
    steps = 12 if args.steps is None and transformer.config.num_tokens > 256 else 8 if args.steps is None else args.steps
    print(f"{folder}: {len(rows)} classes x {args.num} images, {steps} steps, {args.schedule} schedule, seed {args.seed}, on {device}")

    labels = torch.tensor(rows, device=device).repeat_interleave(args.num)
    started = time.time()
    with machine.autocast():
        images, history = draw(tokenizer, transformer, labels, steps=steps, schedule=args.schedule, generator=machine.generator(args.seed),
                               choice_temperature=args.choice_temperature, temperature=args.temperature, top_k=args.top_k,
                               cfg=args.cfg, order=args.order, return_steps=args.film)
        machine.sync()
    seconds = time.time() - started
    runtime.save_image(out, runtime.grid(list(images.split(args.num)), [names[i] for i in rows]))
    print(f"wrote {out}: {len(images)} images in {seconds:.1f} s")
    if args.film:
        first = [i for i in range(len(images)) if i % args.num == 0]          # the strip shows one image of each class
        film = save_film(out, [(predicted[first], mask[first]) for predicted, mask in history])
        print(f"wrote {film[0]} and {film[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="the run's folder (default: the newest in runs/ that holds a transformer)")
    parser.add_argument("--vqgan", help="tokenizer file (default: vqgan.pt in the run's folder)")
    parser.add_argument("--steps", type=runtime.whole, help="T, decoding steps (default: 8, and 12 for 32 x 32 tokens, as in the paper)")
    parser.add_argument("--schedule", default="cosine", help=f"mask schedule: {', '.join(SCHEDULES)} (default: %(default)s)")
    parser.add_argument("--class", dest="classes", nargs="+", metavar="NAME_OR_ID", help="classes to draw, a row each (default: the first ten)")
    parser.add_argument("--num", type=runtime.whole, default=8, help="images of each class (default: %(default)s)")
    parser.add_argument("--seed", type=runtime.whole, default=0, help="(default: %(default)s)")
    parser.add_argument("--choice-temperature", type=runtime.positive, default=4.5, help="noise in the choice of what to keep (default: %(default)s)")
    parser.add_argument("--temperature", type=runtime.positive, default=1.0, help="of the token samples; 0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=runtime.whole, help="sample among the K likeliest tokens (default: all)")
    parser.add_argument("--cfg", type=runtime.positive, default=0.0, help="weight of classifier-free guidance, for runs trained with --class-dropout (default: %(default)s)")
    parser.add_argument("--order", default="confidence", help=f"what is revealed first: {', '.join(ORDERS)} (default: %(default)s)")
    parser.add_argument("--film", action="store_true", help="also write the decoding steps as a film strip and a GIF")
    parser.add_argument("--out", help="the picture to write (default: samples.png in the run's folder)")
    devices.add_machine_flags(parser)
    devices.launch(sample, parser.parse_args())


if __name__ == "__main__":
    devices.command_line(main)
