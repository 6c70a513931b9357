"""Repaints part of a photo with a trained run (§4.3): the decoder is given the tokens to keep.

    python edit.py PHOTO --box 40,60,100,80 --class fish    # class-conditional editing
    python edit.py PHOTO --inpaint centre                   # or --mask MASK.png, white: repainted
    python edit.py PHOTO --outpaint right=0.5               # or left, up, down
    python edit.py PHOTO --extrapolate 128                  # a panorama, 128 pixels wide
    python edit.py PHOTO --reconstruct                      # what the tokenizer alone makes of it

A photo of any size is first cropped or padded to a square, and scaled to the model's resolution.
The result has this resolution too: 64 x 64 pixels for example/, and wider with --extrapolate.
"""
import argparse
import math
import os
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib import editing, flags, metrics, pictures, runtime
from lib.data import find_class
from lib.editing import MOST_FEATHER
from lib.errors import UserError, check_memory, command_line
from lib.image_files import read_image
from lib.sampling import (
    PARALLEL_FLAGS,
    RUN_FLAGS,
    SEED_FLAG,
    SHARED_FLAGS,
    add_sampler_flags,
    draw_step,
    load_run,
    load_tokenizer,
    rand_of_images,
    sampler_options,
)
from maskgit import MaskGIT, decode
from vqgan import VQGAN, as_grid, to_pixels

BATCH = 64                      # variants that are painted at once
COLUMNS = 10                    # of the grid; a panorama has a row of its own
TITLES = ["input", "masked"]    # of the grid's first two pictures


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


TASKS = {                       # each is None if it is not given, --reconstruct too
    "box": ({"type": parse_box, "metavar": "TOP,LEFT,HEIGHT,WIDTH"}, None,
            "repaint the tokens that this box touches, the row above and the column to the left "
            "(as in the released demo; on all four sides if the box ends at borders of tokens)"),
    "mask": ({"metavar": "PNG"}, None, "repaint what is white in this image of the photo's size"),
    "inpaint": (["centre"], None,
                "repaint the centre of the square, half of its width and of its height"),
    "outpaint": ({"type": parse_outpaint, "metavar": "SIDE=FRACTION"}, None,
                 "repaint this fraction of the square at its left, right, up or down side"),
    "extrapolate": (flags.count, None,
                    "extend the square on both sides to this width, in the model's pixels"),
    "reconstruct": ({"action": "store_true"}, None,
                    "write the photo beside its reconstruction; this needs no transformer"),
}
FLAGS = {
    "class": ({"metavar": "NAME_OR_ID"}, None,
              "class to paint (default: the one that best explains what is kept)"),
    "num": (flags.count, 8, "variants to paint"),
    "fit": (["crop", "pad"], "crop",
            "how to make the photo square: crop it, or pad it by repeating its borders"),
    "feather": (flags.number(float, 0, MOST_FEATHER), None,
                "blur of the border in pixels, 0 for none (default: a token's width less one)"),
    "start_step": (flags.whole, 0,
                   "decoding steps to skip, since much is known (the released demo skips 2 of 12)"),
    "film": ({"action": "store_true"}, None, "also write the decoding steps as a strip and a GIF"),
    "out": (str, None, "picture to write; each variant is written beside it, with .1, .2 ... "
                       "before the ending (default: PHOTO.TASK.png in the run's folder; of "
                       "example/, in the working folder)"),
}


def chosen_region(args: argparse.Namespace, photo: Image.Image, side: int) -> Tensor:
    """Returns the region that the flags name, (side, side) bool, true where it is repainted.

    photo: as it was read. side: of the square, in tokens. Raises UserError if the region is not on
    the photo."""
    if args.extrapolate:
        return torch.zeros(side, side, dtype=torch.bool)
    if args.inpaint:
        return editing.centre_region(side)
    if args.outpaint:
        return editing.outpaint_region(*args.outpaint, side)
    if args.box:
        top, left, height, width = args.box
        rows_fit = 0 <= top < top + height <= photo.height
        columns_fit = 0 <= left < left + width <= photo.width
        if not rows_fit or not columns_fit:
            raise UserError(f"--box {top},{left},{height},{width} is empty or reaches outside "
                            f"{args.photo}: its pixels are {photo.width} x {photo.height}")
        place = editing.square_place(*photo.size, args.fit)
        region = editing.box_region(args.box, place, side)
    else:
        mask = read_image(args.mask, background="black")
        if mask.size != photo.size:
            raise UserError(f"the mask {args.mask} is {mask.width} x {mask.height} pixels, "
                            f"{args.photo} {photo.width} x {photo.height}: make it the same size")
        region = editing.mask_region(mask, args.fit, side)
    if not region.any():
        raise UserError(f"nothing of {args.photo} would be repainted: the mask is black, or the "
                        f"region is cut off (--fit pad keeps the whole photo)")
    return region


def check_flags(args: argparse.Namespace, out: Path, size: int, steps: int) -> None:
    """Raises UserError if a flag does not suit the model, if a picture would be too large for its
    format or the memory, or if it would replace the photo or the mask.

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
    frames = 1
    if args.film and args.extrapolate:      # the start, each window, a last one on either side
        frames = 1 + math.ceil((width - size) / (size // 2)) + 2
    elif args.film:
        frames = steps
    floats = 3 * size * width * args.num * frames
    # The images as floats of 4 bytes, twice while their batches are joined.
    check_memory(2 * 4 * floats, f"--num {args.num}")
    outputs = [out, *(variant_path(out, i) for i in range(1, args.num + 1))]
    if args.film:
        outputs += pictures.film_paths(out)
    check_originals(args, outputs)


def check_originals(args: argparse.Namespace, outputs: list[Path]) -> None:
    """Raises UserError if a picture would be written over the photo or the mask."""
    originals = [os.path.realpath(name) for name in (args.photo, args.mask) if name]
    for path in outputs:
        if os.path.realpath(path) in originals:
            raise UserError(f"{path} is the photo or the mask, and would be overwritten: name "
                            f"another picture with --out")


def variant_path(out: Path, i: int) -> Path:
    """Returns the path of variant i = 1, 2, ..."""
    return out.with_suffix(f".{i}{out.suffix}")


# ---------------------------------------------------------------------------------------- painting
# repaint() and extrapolate() return (tokens, masked) of each step, both (B, side, width): the
# predicted tokens, and which of them are still masked. The last step is the result.

def repaint(
    transformer: MaskGIT, known: Tensor, labels: Tensor, options: dict,
) -> list[tuple[Tensor, Tensor]]:
    """Decodes the tokens that are not known: box, mask, inpainting, outpainting.

    known: (side, side), mask_id where it is repainted. labels: (B,). options: of decode()."""
    steps = []

    def keep(t: int, sampled: Tensor, masked: Tensor, confidence: Tensor) -> None:
        steps.append((as_grid(sampled), as_grid(masked)))

    known = known.flatten().expand(len(labels), -1)
    decode(transformer, labels, known=known, on_step=keep, **options)
    return steps


def extrapolate(
    transformer: MaskGIT, tokens: Tensor, labels: Tensor, left: int, right: int, options: dict,
) -> list[tuple[Tensor, Tensor]]:
    """Extends token grids by `right` columns, and then by `left` columns on the left.

    A window of side x side tokens moves by half its width, so that half of it is always known:
        |photo|photo|
              |known| new |
                    |known| new |         and so on; then the same to the left
    tokens: (side, side). labels: (B,). options: of decode(). A step is a place of the window; the
    first in the list is the start."""
    side = len(tokens)
    half = max(1, side // 2)
    starts = []                                                     # the window's left column
    for start in range(left + half, left + right + half, half):
        starts.append(min(start, left + right))
    for start in range(left - half, -half, -half):
        starts.append(max(start, 0))

    canvas = F.pad(tokens, (left, right), value=transformer.mask_id)
    canvases = [canvas.repeat(len(labels), 1, 1)]
    for start in starts:
        canvas = canvases[-1].clone()
        window = canvas[:, :, start:start + side]                   # a view: it is written to
        window[:] = as_grid(decode(transformer, labels, known=window.flatten(1), **options))
        canvases.append(canvas)

    steps = []
    for canvas in canvases:
        masked = canvas == transformer.mask_id
        steps.append((canvas.masked_fill(masked, 0), masked))       # any code: grey will hide it
    return steps


def paint(
    tokenizer: VQGAN, transformer: MaskGIT, known: Tensor, labels: Tensor, margins: tuple[int, int],
    options: dict, film: bool,
) -> list[Tensor]:
    """Paints a variant for each label (B,): a panorama if there are margins.

    known: (side, side), mask_id where it is repainted. margins: pixels to paint left and right of
    the square. options: of decode(). Returns images (B, 3, S, left + S + right) on the CPU, in a
    list: the result alone or, with film, one tensor for each step."""
    stride = tokenizer.config.stride
    left = math.ceil(margins[0] / stride)                           # in tokens
    right = math.ceil(margins[1] / stride)
    overhang = left * stride - margins[0]               # pixels of the first column to cut off
    width = margins[0] + len(known) * stride + margins[1]
    if any(margins):
        steps = extrapolate(transformer, known, labels, left, right, options)
        opacity = 1.0
        at_once = 1                                                 # a panorama can be large
    else:
        steps = repaint(transformer, known, labels, options)
        opacity = 0.85
        at_once = BATCH
    if not film:
        steps = steps[-1:]
    frames = [draw_step(tokenizer, *step, opacity, at_once) for step in steps]
    return [frame[..., overhang:overhang + width] for frame in frames]


def write_pictures(out: Path, photo: Tensor, mask: Tensor, painted: Tensor) -> None:
    """Writes the grid (the photo, the photo with its mask in grey, the variants) and each variant.

    photo: (3, H, W). mask: (H, W). painted: (n, 3, H, W)."""
    masked = torch.where(mask, 0.5, photo)
    cells = torch.cat([photo[None], masked[None], painted])
    columns = 1 if photo.shape[2] > photo.shape[1] else COLUMNS
    pictures.save_image(out, pictures.grid(cells.split(columns), titles=TITLES[:columns]))
    for i, image in enumerate(painted, 1):
        pictures.save_image(variant_path(out, i), pictures.to_pil(image))


# -------------------------------------------------------------------------------------- the script

def choose_class(
    args: argparse.Namespace, transformer: MaskGIT, known: Tensor, classes: list[str],
) -> tuple[int, str]:
    """Returns the label to paint, and why. Raises UserError if --class names none."""
    class_name = vars(args)["class"]                                # Python has no args.class
    if class_name is None:
        label = editing.likeliest_class(transformer, known.flatten(), args.seed)
        return label, "the likeliest, given what is kept"
    return find_class(class_name, classes), "as asked"


@torch.no_grad()
def reconstruct(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Writes the photo, as the model sees it, beside what its tokens keep of it."""
    useless = ["class", "num", "feather", "start_step", "film"]
    useless += PARALLEL_FLAGS | SHARED_FLAGS | SEED_FLAG
    flags.refuse_useless(args, useless, "with --reconstruct, which paints nothing")
    folder, tokenizer, checkpoint = load_tokenizer(args.run, machine, args.vqgan)
    size = checkpoint["image_size"]
    titles = ["photo", "restored"]
    out = pictures.picture_path(args.out, folder, f"{Path(args.photo).stem}.reconstruct.png")
    layout = pictures.GridLayout(2, 1, (size, size), titles=titles)
    pictures.check_picture(out, layout.size, "a smaller model")
    check_originals(args, [out])
    photo = editing.to_square(read_image(args.photo), size, args.fit)[None]         # (1, 3, S, S)
    with machine.autocast():
        restored = tokenizer.decode(tokenizer.encode(machine.put(photo))).float().cpu()
    if machine.leads:
        pictures.save_image(out, pictures.grid([torch.cat([photo, restored])], titles=titles))
        print(f"wrote {out}: {metrics.psnr(photo, restored).item():.1f} dB, with the tokenizer of "
              f"{folder}")


def paint_variants(
    args: argparse.Namespace, machine: runtime.Machine, tokenizer: VQGAN, transformer: MaskGIT,
    known: Tensor, label: int, margins: tuple[int, int], options: dict,
) -> list[Tensor]:
    """Paints --num variants of a class, BATCH at once.

    known, margins, options: as for paint(). Returns what paint() does, for all variants: a list of
    images (num, 3, S, W)."""
    batches = []
    for numbers in torch.arange(args.num).split(BATCH):
        labels = torch.full_like(numbers, label)
        rand = rand_of_images(args.seed, labels, numbers, machine)
        batches.append(paint(tokenizer, transformer, known, machine.put(labels), margins,
                             options | {"rand": rand}, args.film))
    return [torch.cat(frame) for frame in zip(*batches, strict=True)]


@torch.no_grad()
def edit(args: argparse.Namespace, machine: runtime.Machine) -> None:
    """Paints --num variants. Every rank paints the same, and the first one writes them."""
    folder, tokenizer, transformer, checkpoint = load_run(
        args.run, machine, args.vqgan, decoder="parallel")
    classes = checkpoint["classes"]
    size = checkpoint["image_size"]
    stride = tokenizer.config.stride
    options = sampler_options(args, transformer)
    options["start_step"] = args.start_step
    task = next(name for name in TASKS if getattr(args, name) is not None)
    out = pictures.picture_path(args.out, folder, f"{Path(args.photo).stem}.{task}.png")
    check_flags(args, out, size, options["steps"])

    started = time.time()
    photo = read_image(args.photo)
    square = editing.to_square(photo, size, args.fit)               # (3, S, S)
    region = chosen_region(args, photo, size // stride)             # (side, side)
    margin = (args.extrapolate or size) - size
    margins = (margin // 2, margin - margin // 2)                   # pixels left and right of it
    with machine.autocast():
        tokens = tokenizer.encode(square[None].to(machine.device))[0]
        known = tokens.masked_fill(region.to(machine.device), transformer.mask_id)
        label, reason = choose_class(args, transformer, known, classes)
        if machine.leads:
            print(f"{folder}: {args.photo}, {options['steps']} steps, {args.schedule} schedule, "
                  f"seed {args.seed}, on {machine.device}\nclass: {classes[label]} ({reason})",
                  flush=True)
        frames = paint_variants(args, machine, tokenizer, transformer, known, label, margins,
                                options)
    if not machine.leads:
        return
    around = F.pad(square, margins, value=1.0)                      # (3, S, W)
    mask = F.pad(to_pixels(region, stride), margins, value=True)
    feather = editing.default_feather(stride) if args.feather is None else args.feather
    frames = [editing.composite(around, painted, mask, feather) for painted in frames]
    write_pictures(out, around, mask, frames[-1])
    variants = variant_path(out, 1).name
    if args.num > 1:
        variants += f" to {variant_path(out, args.num).name}"
    print(f"wrote {out} and, beside it, {variants} in {time.time() - started:.1f} s")
    if args.film:
        first = 0 if args.extrapolate else args.start_step + 1
        titles = [f"step {t}" for t in range(first, first + len(frames))]
        pictures.save_film(out, frames, titles)


def main() -> None:
    """Parses the flags and edits."""
    parser = flags.Parser(__doc__)
    parser.add_argument("photo", metavar="PHOTO", help="the image to edit, of any size")
    tasks = parser.add_argument_group("the task", "one of these; pixels are those of the photo")
    flags.add_flags(tasks.add_mutually_exclusive_group(required=True), TASKS)
    flags.add_flags(parser, FLAGS)
    flags.add_flags(parser, RUN_FLAGS)
    add_sampler_flags(parser)
    flags.add_machine_flags(parser, compiles=False)
    args = flags.parse(parser)
    runtime.launch(reconstruct if args.reconstruct else edit, args)


if __name__ == "__main__":
    command_line(main, interrupted="stopped by Ctrl-C: every picture is whole or not there")
