"""Edits a photo of any size with a trained run (§4.3): the decoder knows the tokens that are kept.

    python edit.py PHOTO --box 40,60,100,80 --class fish    # class-conditional editing
    python edit.py PHOTO --inpaint centre                   # or --mask MASK.png, white: repainted
    python edit.py PHOTO --outpaint right=0.5               # or left, up, down
    python edit.py PHOTO --extrapolate 128                  # a panorama, 128 pixels wide

The photo is cropped or padded to the model's square first; only --extrapolate makes it wider.
"""
import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib import flags, pictures, runtime
from lib.data import find_class
from lib.editing import composite, default_feather, fit_square, likeliest_class, to_square
from lib.flags import UserError
from lib.image_files import read_image
from lib.sampling import add_run_flags, add_sampler_flags, load_run, sampler_options
from maskgit import MaskGIT, decode
from sequential import CausalTransformer
from vqgan import VQGAN, as_grid, to_pixels

BATCH = 64                      # variants that are painted at once
COLUMNS = 10                    # of the grid; a panorama has a row of its own
TITLES = ["input", "masked"]    # of the grid's first two pictures
STEP_OPACITY = 0.85             # of the grey over masked tokens in a film; the rest is predicted


# ------------------------------------------------------------------------------------------ flags

def parse_box(text: str) -> tuple[int, ...]:
    """Reads TOP,LEFT,HEIGHT,WIDTH: an argparse type."""
    match = re.fullmatch(r"(-?\d+),(-?\d+),(-?\d+),(-?\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text} should be TOP,LEFT,HEIGHT,WIDTH in pixels, such as 40,60,100,80")
    return tuple(int(number) for number in match.groups())


def parse_outpaint(text: str) -> tuple[str, float]:
    """Reads SIDE=FRACTION: an argparse type."""
    match = re.fullmatch(r"(left|right|up|down)=(0?\.\d+)", text)
    if not match or float(match[2]) == 0:
        raise argparse.ArgumentTypeError(
            f"{text} should be a side and a fraction: left=0.5, or right, up or down")
    return match[1], float(match[2])


TASKS = {
    "box": ({"type": parse_box, "metavar": "TOP,LEFT,HEIGHT,WIDTH"}, None,
            "repaint this box of the photo, rounded to whole tokens and one more on each side"),
    "mask": ({"metavar": "PNG"}, None, "repaint what is white in this image of the photo's size"),
    "inpaint": (["centre"], None, "repaint the centre, half of the width and of the height"),
    "outpaint": ({"type": parse_outpaint, "metavar": "SIDE=FRACTION"}, None,
                 "repaint this fraction of the photo at its left, right, up or down side"),
    "extrapolate": (flags.count, None,
                    "lengthen the photo to both sides, to this width in the model's pixels"),
}
FLAGS = {
    "class": ({"metavar": "NAME_OR_ID", "dest": "class_name"}, None,
              "what to paint (default: the class that best explains what is kept)"),
    "num": (flags.count, 8, "variants to paint"),
    "fit": (["crop", "pad"], "crop",
            "how to make the photo square: crop it, or pad it by repeating its borders"),
    "feather": (flags.non_negative, None,
                "blur of the border in pixels, 0 for none (default: a token's width less one)"),
    "start_step": (flags.whole, 0,
                   "decoding steps to skip, since much is known (the released demo skips 2 of 12)"),
    "film": ({"action": "store_true"}, None, "also write the decoding steps as a strip and a GIF"),
    "out": (str, None, "the picture to write, also with .1, .2 ... before its ending for each "
                       "variant (default: PHOTO.TASK.png in the run's folder)"),
}


# ------------------------------------------------------------------------------- what is repainted
# Each region is (side, side) bool over the tokens of the square, true where they are repainted.

def tokens_touched(start: int, length: int, across: int, side: int) -> Tensor:
    """Returns the tokens along one axis that a stretch of pixels touches, and one more at either
    end: (side,) bool.

    start, length: of the stretch, from the square's edge. across: the square's side. All of them
    are in pixels of the photo."""
    # In units of 1 / across of a token, so that everything is a whole number.
    first = max(0, start * side)
    last = min(across * side, (start + length) * side)
    if first >= last:
        return torch.zeros(side, dtype=torch.bool)      # the crop cut it off
    first_token = first // across
    # As released, the region ends one token after the box's length in tokens, but here never before
    # the last token that the box touches.
    end = max(first_token + (last - first) // across + 1, math.ceil(last / across))
    tokens = torch.arange(side)
    return (tokens >= first_token - 1) & (tokens < end)


def box_region(box: tuple[int, ...], place: tuple[int, ...], side: int) -> Tensor:
    """Returns the tokens that a box touches and one more on each side.

    box: (top, left, height, width); place: (left, top, side) of the square, from fit_square(). Both
    are in pixels of the photo."""
    top, left, height, width = box
    square_left, square_top, across = place
    rows = tokens_touched(top - square_top, height, across, side)
    columns = tokens_touched(left - square_left, width, across, side)
    return rows[:, None] & columns


def mask_region(mask: Image.Image, fit: str, size: int, side: int) -> Tensor:
    """Returns the tokens in which a mask, as large as the photo, has a white pixel.

    size: of the square, in pixels."""
    square, _ = fit_square(mask, size, fit, "constant")             # padding is black: kept
    white = torch.from_numpy(np.array(square.convert("L"))) > 127
    return F.max_pool2d(white[None].float(), size // side)[0] > 0


def centre_region(side: int) -> Tensor:
    """Returns the tokens of the centre, half of the width and of the height."""
    region = torch.zeros(side, side, dtype=torch.bool)
    margin = side // 4
    region[margin:side - margin, margin:side - margin] = True
    return region


def outpaint_region(direction: str, fraction: float, side: int) -> Tensor:
    """Returns the tokens at one side of the photo. direction: left, right, up or down."""
    region = torch.zeros(side, side, dtype=torch.bool)
    count = math.ceil(fraction * side)
    if direction == "left":
        region[:, :count] = True
    elif direction == "right":
        region[:, side - count:] = True
    elif direction == "up":
        region[:count] = True
    else:
        region[side - count:] = True
    return region


def chosen_region(args: argparse.Namespace, photo: Image.Image, size: int, side: int) -> Tensor:
    """Returns the region that the flags name. Raises UserError if it is not on the photo.

    photo: as it was read. size, side: of the square, in pixels and in tokens."""
    if args.inpaint:
        return centre_region(side)
    if args.outpaint:
        return outpaint_region(*args.outpaint, side)
    if args.box:
        top, left, height, width = args.box
        rows_fit = 0 <= top < top + height <= photo.height
        columns_fit = 0 <= left < left + width <= photo.width
        if not rows_fit or not columns_fit:
            raise UserError(f"--box {top},{left},{height},{width} is empty or reaches outside "
                            f"{args.photo}, which is {photo.width} x {photo.height} pixels")
        _, place = fit_square(photo, size, args.fit)
        region = box_region(args.box, place, side)
    else:
        mask = read_image(args.mask)
        if mask.size != photo.size:
            raise UserError(f"the mask {args.mask} is {mask.width} x {mask.height} pixels, "
                            f"{args.photo} {photo.width} x {photo.height}: make it the same size")
        region = mask_region(mask, args.fit, size, side)
    if not region.any():
        raise UserError(f"nothing of {args.photo} is left to repaint after --fit {args.fit}: is "
                        f"the box cut off, or the mask black?")
    return region


# ---------------------------------------------------------------------------------------- painting

def repaint(
    tokenizer: VQGAN, transformer: MaskGIT, known: Tensor, labels: Tensor, options: dict,
    film: bool = False,
) -> list[Tensor]:
    """Decodes the tokens that are not known: box, mask, inpainting, outpainting.

    known: (side, side), mask_id where it is repainted. labels: (B,). options: of decode().
    Returns the result (B, 3, S, S) in a list; with film, one for each step, the result last."""
    frames = []

    def show(t: int, sampled: Tensor, masked: Tensor, confidence: Tensor) -> None:
        images = tokenizer.decode(as_grid(sampled))
        frames.append(pictures.grey_out(images, as_grid(masked), STEP_OPACITY))

    known = known.flatten().expand(len(labels), -1)
    if film:
        decode(transformer, labels, known=known, on_step=show, **options)
        return frames                                               # the last has nothing masked
    tokens = decode(transformer, labels, known=known, **options)
    return [tokenizer.decode(as_grid(tokens))]


def extrapolate(
    transformer: MaskGIT, tokens: Tensor, labels: Tensor, left: int, right: int, options: dict,
) -> list[Tensor]:
    """Lengthens token grids by `right` columns, and then by `left` columns on the left.

    A window of side x side tokens moves by half its width, so that half of it is always known.
    tokens: (B, side, side). options: of decode(). Returns a list of (B, side, left + side + right):
    the start, and one for each place of the window, with mask_id where nothing is painted yet."""
    side = tokens.shape[2]
    half = max(1, side // 2)
    starts = []                                                     # the window's left column
    for start in range(left + half, left + right + half, half):
        starts.append(min(start, left + right))
    for start in range(left - half, -half, -half):
        starts.append(max(start, 0))
    canvases = [F.pad(tokens, (left, right), value=transformer.mask_id)]
    for start in starts:
        canvas = canvases[-1].clone()
        window = canvas[:, :, start:start + side]                   # a view: it is written to
        window[:] = as_grid(decode(transformer, labels, known=window.flatten(1), **options))
        canvases.append(canvas)
    return canvases


def panorama(
    tokenizer: VQGAN, transformer: MaskGIT, tokens: Tensor, labels: Tensor,
    margins: tuple[int, int], options: dict, film: bool = False,
) -> list[Tensor]:
    """Paints to both sides of the photo.

    tokens: the photo's, (side, side). labels: (B,). margins: pixels to paint left and right of it.
    options: of decode(). Returns the result (B, 3, S, left + S + right) in a list; with film, one
    for each place of the window, the result last."""
    stride = tokenizer.config.stride
    left, right = [math.ceil(margin / stride) for margin in margins]            # in tokens
    overhang = left * stride - margins[0]               # pixels of the first column that go again
    width = margins[0] + len(tokens) * stride + margins[1]
    tokens = tokens.expand(len(labels), -1, -1)
    canvases = extrapolate(transformer, tokens, labels, left, right, options)
    frames = []
    for canvas in canvases if film else canvases[-1:]:
        masked = canvas == transformer.mask_id
        codes = canvas.masked_fill(masked, 0)           # any code: grey will hide it
        # The decoder is convolutional: it takes the whole width at once, so there are no seams. One
        # image at a time, because a panorama can be large.
        images = torch.cat([tokenizer.decode(image[None]) for image in codes])
        images = pictures.grey_out(images, masked, 1.0)
        frames.append(images[..., overhang:overhang + width])
    return frames


# -------------------------------------------------------------------------------------- the script

def chosen_class(
    name: str | None, classes: list[str], transformer: MaskGIT, known: Tensor, seed: int,
) -> tuple[int, str]:
    """Returns the class to paint and, for the user, its name and why it was chosen.

    name: as asked for, or None. known: tokens, mask_id where not known."""
    if name is not None:
        label = find_class(name, classes)
        return label, f"{classes[label]} (as asked)"
    label = likeliest_class(transformer, known.flatten(), seed)
    return label, f"{classes[label]} (the likeliest for what is kept of the image)"


def check_flags(args: argparse.Namespace, out: Path, size: int, steps: int) -> None:
    """Raises UserError for flags that do not suit the model, or pictures too large for a format.

    size: the side of the model's square. steps: T of the decoder."""
    if args.start_step >= steps:
        raise UserError(f"--start-step {args.start_step} skips all {steps} steps: lower it")
    width = args.extrapolate or size
    if args.extrapolate and width <= size:
        raise UserError(f"--extrapolate {width} must be wider than the model's images, which have "
                        f"{size} pixels")
    columns = 1 if args.extrapolate else COLUMNS
    rows = math.ceil((args.num + 2) / columns)
    layout = pictures.GridLayout(columns, rows, (size, width), titles=TITLES[:columns])
    pictures.check_picture(out, layout.size, "a lower --num or --extrapolate")


def paint(
    tokenizer: VQGAN, transformer: MaskGIT, known: Tensor, labels: Tensor, margins: tuple[int, int],
    options: dict, film: bool, machine: runtime.Machine,
) -> list[Tensor]:
    """Paints a variant for each label (n,), BATCH at a time: a panorama if it has margins.

    The other arguments and what is returned, on the CPU, are as for panorama() and repaint()."""
    batches = []                                                    # a list of frames for each
    for batch in labels.split(BATCH):
        if any(margins):
            frames = panorama(tokenizer, transformer, known, batch, margins, options, film)
        else:
            frames = repaint(tokenizer, transformer, known, batch, options, film)
        machine.sync()
        batches.append([frame.float().cpu() for frame in frames])
    return [torch.cat(frame) for frame in zip(*batches, strict=True)]


def write_pictures(out: Path, photo: Tensor, mask: Tensor, painted: Tensor) -> None:
    """Writes the grid (the photo, the photo with its mask in grey, the variants) and each variant.

    photo: (3, H, W). mask: (H, W). painted: (n, 3, H, W)."""
    masked = torch.where(mask, 0.5, photo)
    cells = torch.cat([photo[None], masked[None], painted])
    columns = 1 if photo.shape[2] > photo.shape[1] else COLUMNS
    pictures.save_image(out, pictures.grid(cells.split(columns), titles=TITLES[:columns]))
    for i, image in enumerate(painted, 1):
        pictures.save_image(out.with_suffix(f".{i}{out.suffix}"), pictures.to_pil(image))


@torch.no_grad()
def edit(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Paints --num variants. Every rank paints the same, and the first one writes them."""
    folder, tokenizer, transformer, checkpoint = load_run(
        args.run, machine, args.vqgan, args.decoder)
    if isinstance(transformer, CausalTransformer):
        raise UserError(f"{folder} holds an autoregressive transformer, which can only continue in "
                        f"raster order: use a run trained with --decoder parallel")
    size = checkpoint["image_size"]
    options = sampler_options(args, transformer)
    options |= {"start_step": args.start_step, "generator": machine.generator(args.seed)}
    task = next(name for name in TASKS if getattr(args, name) is not None)
    out = pictures.picture_path(args.out, folder, f"{Path(args.photo).stem}.{task}.png")
    check_flags(args, out, size, options["steps"])

    started = time.time()
    photo = read_image(args.photo)
    square = to_square(photo, size, args.fit)                       # (3, S, S)
    margins = (0, 0)                                                # left and right of it, painted
    if args.extrapolate:
        left = (args.extrapolate - size) // 2
        margins = (left, args.extrapolate - size - left)
    with machine.autocast():
        known = tokenizer.encode(square[None].to(machine.device))[0]            # (side, side)
        region = torch.zeros(known.shape, dtype=torch.bool)
        if not args.extrapolate:
            region = chosen_region(args, photo, size, len(known))
            known = torch.where(region.to(machine.device), transformer.mask_id, known)
        label, reason = chosen_class(
            args.class_name, checkpoint["classes"], transformer, known, args.seed)
        if machine.leads:
            print(f"{folder}: {args.photo}, {options['steps']} steps, {args.schedule} schedule, "
                  f"seed {args.seed}, on {machine.device}\nclass: {reason}", flush=True)
        labels = machine.put(torch.full((args.num,), label))
        frames = paint(tokenizer, transformer, known, labels, margins, options, args.film, machine)
    if not machine.leads:
        return
    around = F.pad(square, margins, value=1.0)                      # (3, S, W)
    mask = F.pad(to_pixels(region, tokenizer.config.stride), margins, value=True)
    feather = default_feather(tokenizer.config.stride) if args.feather is None else args.feather
    frames = [composite(around, painted, mask, feather) for painted in frames]
    write_pictures(out, around, mask, frames[-1])
    print(f"wrote {out} and {out.with_suffix('')}.1{out.suffix} to .{args.num}{out.suffix} "
          f"in {time.time() - started:.1f} s")
    if args.film:
        first = 0 if args.extrapolate else args.start_step + 1
        titles = [f"step {t}" for t in range(first, first + len(frames))]
        pictures.save_film(out, frames, titles)


def main() -> None:
    """Parses the flags and edits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", metavar="PHOTO", help="the image to edit, of any size")
    tasks = parser.add_argument_group("the task", "one of these; pixels are those of the photo")
    flags.add_flags(tasks.add_mutually_exclusive_group(required=True), TASKS)
    flags.add_flags(parser, FLAGS)
    add_run_flags(parser)
    add_sampler_flags(parser.add_argument_group("the sampler"))
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(edit, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main, interrupted="stopped by Ctrl-C: nothing was written")
