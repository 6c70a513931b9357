"""Edits a photo of any size with a trained run (§4.3): the tokens that are kept are known from the start.

    python edit.py PHOTO --box 40,60,100,80 --class fish      # class-conditional editing: the box becomes a fish
    python edit.py PHOTO --inpaint centre                     # or --mask MASK.png, white where to repaint
    python edit.py PHOTO --outpaint right=0.5                 # or left, up, down
    python edit.py PHOTO --extrapolate 128                    # a panorama, 128 of the model's pixels wide
"""
import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib import flags, runtime
from lib.data import find_class, read_image
from lib.editing import composite, default_feather, fit_square, likeliest_class, to_square
from lib.flags import UserError
from lib.pictures import grid, picture_path, restore, save_film, save_image, to_pil
from lib.sampling import add_run_flags, add_sampler_flags, load_run, sampler_options
from maskgit import SCHEDULES, MaskGIT, decode
from vqgan import VQGAN, as_grid, to_pixels

TASKS = {
    "box": ({"metavar": "TOP,LEFT,HEIGHT,WIDTH"}, None, "repaint this box, grown to whole tokens and one around"),
    "mask": ({"metavar": "PNG"}, None, "repaint what is white in this image, which is as large as the photo"),
    "inpaint": (["centre"], None, "repaint the centre, half of the width and of the height"),
    "outpaint": ({"metavar": "SIDE=FRACTION"}, None, "repaint this share of the photo at its left, right, up or down"),
    "extrapolate": (flags.count, None, "lengthen the photo to both sides, to so many of the model's pixels"),
}
FLAGS = {
    "class": ({"metavar": "NAME_OR_ID", "dest": "class_name"}, None, "what to paint (default: the likeliest)"),
    "num": (flags.count, 8, "variants of the photo"),
    "fit": (["crop", "pad"], "crop", "bring the photo to the model's square: crop it, or pad it with its borders"),
    "feather": (flags.non_negative, None, "blur of the border in pixels, 0 for none (default: a token's width less one)"),
    "start_step": (flags.whole, 0, "decoding steps to pass over, as much is known (the released demo: 2 of 12)"),
    "out": (str, None, "the grid to write (default: in the run's folder, the photo's name and what was done)"),
}


def box_region(args, photo, size, side):
    """The tokens that --box touches, and one more on either side. Raises ValueError for a bad box.

    photo: a PIL image, in whose pixels the box is. size: of the model's square, in pixels; side: in tokens."""
    try:
        y, x, height, width = [int(part) for part in args.box.split(",")]
    except ValueError:
        raise UserError(f"--box {args.box} should be TOP,LEFT,HEIGHT,WIDTH in pixels, such as 40,60,100,80") from None
    if not (0 <= y < y + height <= photo.height and 0 <= x < x + width <= photo.width):
        raise UserError(f"--box {args.box} is empty or reaches outside {args.photo}, "
                         f"which is {photo.width} x {photo.height} pixels")
    stride, (left, top, across) = size // side, fit_square(photo, size, args.fit)[1]

    def touched(start, length):
        start, stop = max(0, start * size / across), min(size, (start + length) * size / across)  # in the square
        first, places = int(start // stride), torch.arange(side)
        # As released, it ends a token after the box's length, but never before a token that the box touches.
        end = max(first + int((stop - start) // stride) + 1, math.ceil(stop / stride))
        return (places >= first - 1) & (places < end) & (start < stop)
    return touched(y - top, height)[:, None] & touched(x - left, width)


def mask_region(args, photo, size, side):
    """The tokens in which --mask has a white pixel. Raises ValueError for a mask of another size."""
    mask = read_image(args.mask)
    if mask.size != photo.size:
        raise UserError(f"the mask {args.mask} is {mask.width} x {mask.height} pixels, {args.photo} is "
                         f"{photo.width} x {photo.height}: they must have the same size")
    fitted, _ = fit_square(mask, size, args.fit, "constant")                    # what is padded is black
    white = torch.from_numpy(np.array(fitted.convert("L"))) > 127
    return white.view(side, size // side, side, size // side).any(3).any(1)


def inpaint_region(args, photo, size, side):
    """--inpaint centre: half of the width and of the height."""
    margin = side // 4
    return F.pad(torch.ones([side - 2 * margin] * 2, dtype=torch.bool), [margin] * 4)


def outpaint_region(args, photo, size, side):
    """--outpaint SIDE=FRACTION: that share of the photo, at that side. Raises ValueError for anything else."""
    match = re.fullmatch(r"(left|down|right|up)=(0?\.\d+)", args.outpaint)
    if not match or float(match[2]) == 0:
        raise UserError(f"--outpaint {args.outpaint} should be left, right, up or down, = and a fraction between "
                         f"0 and 1, such as right=0.5")
    at_the_left = (torch.arange(side) < math.ceil(float(match[2]) * side)).expand(side, side)
    return at_the_left.rot90(["left", "down", "right", "up"].index(match[1]))   # a quarter turn brings it down


REGIONS = {"box": box_region, "mask": mask_region, "inpaint": inpaint_region, "outpaint": outpaint_region}


def repaint(args, tokenizer, transformer, picture, known, labels, options):
    """Box, mask, inpainting, outpainting: decodes the tokens that are not known.

    picture: the photo (3, S, S). known: (side, side), mask_id where it is painted. labels: (B,). options: of decode().
    Returns the picture, its mask (S, S) and a list of frames (B, 3, S, S): of the last step, or with --film of all."""
    _, steps = decode(transformer, labels, known=known.flatten().expand(len(labels), -1), return_steps=True, **options)
    frames = [restore(tokenizer, as_grid(predicted), as_grid(masked))
              for predicted, masked, _ in (steps if args.film else steps[-1:])]
    return picture, to_pixels(known == transformer.mask_id, tokenizer.config.stride).cpu(), frames


def panorama(args, tokenizer, transformer, picture, tokens, labels, options):
    """Extrapolation: paints to both sides of the photo until all is --extrapolate pixels wide. Returns as repaint()."""
    size, width, config = picture.shape[-1], args.extrapolate, tokenizer.config
    if width <= size:
        raise UserError(f"--extrapolate {width} must be wider than the image, which is {size} pixels here")
    margins = (width - size) // 2, (width - size + 1) // 2                      # in pixels, left and right of the photo
    left, right = [math.ceil(margin / config.stride) for margin in margins]     # in tokens, so the first may overhang
    overhang = left * config.stride - margins[0]
    mask = F.pad(torch.zeros(size, size, dtype=torch.bool), margins, value=True)
    canvases = extrapolate(transformer, tokens.expand(len(labels), -1, -1), labels, left, right, **options)
    # The decoder is convolutional: it restores the whole width at once, so there are no seams. It knows no mask_id.
    frames = [restore(tokenizer, wide.clamp(max=config.codebook_size - 1), wide == transformer.mask_id, 1.0, batch=1)
              for wide in (canvases if args.film else canvases[-1:])]
    return F.pad(picture, margins, value=1.0), mask, [frame[..., overhang:overhang + width] for frame in frames]


def extrapolate(transformer, tokens, labels, left, right, **options):
    """Lengthens token grids (B, side, side) by `right` columns, and then by `left` columns on the left.

    The window of side x side tokens moves by half its width, so that half of it is known. options: of decode(). Returns
    a list of (B, side, left + side + right), the start and one for each place of the window, with mask_id where nothing
    is painted yet; the last one has none."""
    side, half = tokens.shape[2], max(1, tokens.shape[2] // 2)
    canvases = [F.pad(tokens, (left, right), value=transformer.mask_id)]
    starts = [min(start, left + right) for start in range(left + half, left + right + half, half)]
    starts += [max(start, 0) for start in range(left - half, -half, -half)]
    for start in starts:
        canvas, columns = canvases[-1].clone(), slice(start, start + side)
        canvas[:, :, columns] = as_grid(decode(transformer, labels, known=canvas[:, :, columns].flatten(1), **options))
        canvases.append(canvas)
    return canvases


@torch.no_grad()
def edit(args, machine):
    """Paints --num variants of the photo. Every rank paints the same, and the first one writes them."""
    folder, tokenizer, transformer, checkpoint = load_run(args.run, machine, VQGAN, MaskGIT, args.vqgan, args.decoder)
    if transformer.config.causal:
        raise UserError(f"{folder} holds an autoregressive transformer, which can only go on in raster order: to edit "
                         f"images, use a run trained with --decoder parallel")
    task, = [name for name in TASKS if getattr(args, name) is not None]
    out = picture_path(args.out or folder / f"{Path(args.photo).stem}.{task}.png")
    options = sampler_options(args, transformer.config)
    options |= {"start_step": args.start_step, "generator": machine.generator(args.seed)}

    started, size, batches = time.time(), checkpoint["image_size"], []
    photo = read_image(args.photo)
    picture = to_square(photo, size, args.fit)
    with machine.autocast():
        paint, known = panorama, tokenizer.encode(picture[None].to(machine.device))[0]                 # (side, side)
        if task in REGIONS:
            region = REGIONS[task](args, photo, size, len(known))
            if not region.any():
                raise UserError(f"nothing of {args.photo} is left to repaint after --fit {args.fit}: is the box cut "
                                 f"off, or the mask black?")
            paint, known = repaint, torch.where(region.to(machine.device), transformer.mask_id, known)
        names = checkpoint["classes"]
        if args.class_name is not None:
            label = find_class(args.class_name, names)
            reason = f"{names[label]} (as asked)"
        else:
            label = likeliest_class(transformer, known.flatten(), args.seed)
            reason = f"{names[label]} (the likeliest for what is kept of the image)"
        if machine.leads:
            print(f"{folder}: {args.photo}, {options['steps']} steps, {args.schedule} schedule, seed {args.seed}, "
                  f"on {machine.device}\nclass: {reason}", flush=True)
        for labels in torch.full((args.num,), label).split(64):
            around, mask, frames = paint(args, tokenizer, transformer, picture, known, machine.put(labels), options)
            batches.append(frames)
            machine.sync()
    feather = default_feather(tokenizer.config.stride) if args.feather is None else args.feather
    frames = [composite(around, torch.cat(parts).cpu(), mask, feather) for parts in zip(*batches)]
    seconds = time.time() - started
    if not machine.leads:
        return
    # The picture, the same with its mask in grey, and the variants; each panorama has a row of its own.
    cells = torch.cat([torch.stack([around, torch.where(mask, 0.5, around)]), frames[-1]])
    columns = 10 if task in REGIONS else 1
    save_image(out, grid(cells.split(columns), titles=["input", "masked"][:columns]))
    for i, image in enumerate(frames[-1], 1):
        save_image(out.with_suffix(f".{i}{out.suffix}"), to_pil(image))
    print(f"wrote {out} and {out.with_suffix('')}.1{out.suffix} to .{args.num}{out.suffix} in {seconds:.1f} s")
    if args.film:
        save_film(out, frames)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", metavar="PHOTO", help="the image to edit, of any size")
    what = parser.add_argument_group("what is done", "one of these; pixels are those of the photo")
    flags.add_flags(what.add_mutually_exclusive_group(required=True), TASKS)
    flags.add_flags(parser, FLAGS)
    parser.add_argument("--film", action="store_true", help="also write the decoding steps as a film strip and a GIF")
    add_run_flags(parser)
    add_sampler_flags(parser.add_argument_group("the sampler"), SCHEDULES, ORDERS)
    flags.add_machine_flags(parser, compiles=False)
    runtime.launch(edit, parser.parse_args())


if __name__ == "__main__":
    flags.command_line(main)
