"""Draws and edits images with a trained run: parallel decoding (§3.3) of tokens, then the tokenizer's decoder.

    python sample.py --steps 8 --schedule cosine                # the newest run, a row for each class
    python sample.py --run runs/shapes --class heart 3 --num 12 --seed 1
    python sample.py --film                                     # also the decoding steps, as a strip and a GIF
    python sample.py --compare                                  # beside the autoregressive decoder of the same run
Image manipulation (§4.3), each of a photo of any size:
    python sample.py --image PHOTO --box 40,60,100,80 --class lorikeet      # what is in the box becomes a lorikeet
    python sample.py --image PHOTO --inpaint centre                         # or --mask MASK.png, white to be repainted
    python sample.py --image PHOTO --outpaint right=0.5
    python sample.py --image PHOTO --extrapolate 1024                       # a panorama, to both sides
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

import devices
import runtime
from data import read_image
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


def default_steps(num_tokens):
    """T of the paper: 8, and 12 for 32 x 32 tokens (§4.2)."""
    return 12 if num_tokens > 256 else 8


def add_sampler_flags(parser):
    """The flags that say which run draws, and how: for this script and evaluate.py."""
    parser.add_argument("--run", help="the run's folder (default: the newest in runs/ that holds a transformer)")
    parser.add_argument("--vqgan", help="tokenizer file (default: vqgan.pt in the run's folder)")
    parser.add_argument("--decoder", choices=STAGES, help="which transformer of the run (default: parallel, where it is there)")
    parser.add_argument("--steps", type=runtime.whole, help="T, decoding steps (default: 8, and 12 for 32 x 32 tokens, as in the paper)")
    parser.add_argument("--schedule", default="cosine", help=f"mask schedule: {', '.join(SCHEDULES)} (default: %(default)s)")
    parser.add_argument("--seed", type=runtime.whole, default=0, help="(default: %(default)s)")
    parser.add_argument("--choice-temperature", type=runtime.positive, default=4.5, help="noise in the choice of what to keep (default: %(default)s)")
    parser.add_argument("--temperature", type=runtime.positive, default=1.0, help="of the token samples; 0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=runtime.whole, help="sample among the K likeliest tokens (default: all)")
    parser.add_argument("--cfg", type=runtime.positive, default=0.0, help="weight of classifier-free guidance, for runs trained with --class-dropout (default: %(default)s)")
    parser.add_argument("--order", default="confidence", help=f"what is revealed first: {', '.join(ORDERS)} (default: %(default)s)")


def sampler_options(args, transformer):
    """What those flags give to decode(), or to decode_sequential() for a causal transformer."""
    options = {"temperature": args.temperature, "top_k": args.top_k}
    if transformer.config.causal:
        return options
    steps = default_steps(transformer.config.num_tokens) if args.steps is None else args.steps
    return options | {"steps": steps, "schedule": args.schedule, "choice_temperature": args.choice_temperature, "cfg": args.cfg,
                      "order": args.order}


def draw(tokenizer, transformer, labels, batch=64, known=None, **options):
    """decode() (or decode_sequential(), for a causal transformer) and the tokenizer's decoder, in batches.

    labels: (n,). known: (n, N) or None. options: as for the decoding function.
    Returns images (n, 3, H, W), and where return_steps is among the options a list of what is predicted after each step,
    tokens still masked in grey, images of the same shape."""
    images, history = [], []
    film = options.pop("return_steps", False)
    for start in range(0, len(labels), batch):
        part = labels[start:start + batch]
        if transformer.config.causal:
            tokens = decode_sequential(transformer, part, **options)
            places, eighth = torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[1] / 8
            steps = [(tokens, (places >= round(i * eighth)).expand_as(tokens)) for i in range(1, 9)]     # its film has 8 frames
        else:
            given = None if known is None else known[start:start + batch]
            tokens, steps = decode(transformer, part, known=given, return_steps=True, **options)
        images.append(restore(tokenizer, tokens))
        history.append([show_masked(tokenizer, *step, 1 if transformer.config.causal else 0.85) for step in steps if film])
    return torch.cat(images), [torch.cat(step) for step in zip(*history)]


def show_masked(tokenizer, tokens, mask, grey=0.85):
    """Tokens (B, N) as images (B, 3, H, W), those in mask (B, N) greyed."""
    side = math.isqrt(tokens.shape[1])
    mask = to_pixels(mask.reshape(-1, 1, side, side).float(), tokenizer) * grey
    return restore(tokenizer, tokens) * (1 - mask) + 0.5 * mask


def to_pixels(mask, tokenizer):
    """A mask of tokens (..., h, w) -> of the pixels that they stand for (..., h * stride, w * stride)."""
    stride = tokenizer.config.stride
    return mask.repeat_interleave(stride, -2).repeat_interleave(stride, -1)


@torch.no_grad()
def restore(tokenizer, tokens):
    """Tokens (B, N) of a square grid -> images (B, 3, H, W)."""
    side = math.isqrt(tokens.shape[1])
    return tokenizer.decode(tokens.view(-1, side, side))


def save_film(path, frames):
    """The decoding steps as a strip (a row an image) and as a GIF beside `path`.

    frames: images (n, 3, H, W), one tensor a step. Returns the paths of both."""
    strip, gif = path.with_suffix(".film.png"), path.with_suffix(".film.gif")
    rows = [torch.stack([frame[i] for frame in frames]) for i in range(min(8, len(frames[0])))]
    runtime.save_image(strip, runtime.grid(rows, titles=[f"step {t + 1}" for t in range(len(frames))]))
    across = math.isqrt(len(frames[0]) - 1) + 1
    pages = [runtime.grid(list(frame.split(across))) for frame in frames]
    runtime.save_image(gif, pages[0], save_all=True, append_images=pages[1:] + pages[-1:] * 4, duration=350, loop=0)
    return strip, gif


# ------------------------------------------------------------------------------------------ image manipulation (§4.3)

TASKS = ("box", "mask", "inpaint", "outpaint", "extrapolate")


def fit_square(image, size, how, padding="edge"):
    """Brings a PIL image to size x size. how: crop its centre, or pad its shorter side (padding: as for numpy.pad).

    Returns the PIL image, and (left, top, side) of the square in the pixels of the image."""
    width, height = image.size
    side = min(width, height) if how == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if how == "pad":
        image = Image.fromarray(np.pad(np.asarray(image), (
            (-top, side - height + top), (-left, side - width + left), (0, 0)), padding))
        box = (0, 0, side, side)
    else:
        box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), (left, top, side)


def repaint_region(args, photo, square, size, stride):
    """Which tokens the flags ask to paint anew: a boolean (side, side) tensor, true in whole tokens.

    photo: the PIL image as it was read, in whose pixels box and mask are; square: what fit_square returned for it.
    Raises ValueError for a region that is malformed, outside or empty."""
    side, (left, top, across) = size // stride, square
    region = torch.zeros(side, side, dtype=torch.bool)
    if args.box is not None:
        try:
            y, x, height, width = [int(part) for part in args.box.split(",")]
        except ValueError:
            raise ValueError(f"--box {args.box} should be TOP,LEFT,HEIGHT,WIDTH in pixels, such as 40,60,100,80") from None
        if height < 1 or width < 1 or y < 0 or x < 0 or y + height > photo.height or x + width > photo.width:
            raise ValueError(f"--box {args.box} is empty or reaches outside {args.image}, which is {photo.width} x {photo.height} pixels")

        def tokens(start, length):       # in pixels of the photo -> the tokens, and one more on either side as in the released demo
            start, stop = max(0, start * size / across), min(size, (start + length) * size / across)
            if start >= stop:
                return slice(0)
            first = int(start // stride)
            return slice(max(0, first - 1), max(first + int((stop - start) // stride) + 1, math.ceil(stop / stride)))
        region[tokens(y - top, height), tokens(x - left, width)] = True
    elif args.mask is not None:
        mask = read_image(args.mask)
        if mask.size != photo.size:
            raise ValueError(f"the mask {args.mask} is {mask.width} x {mask.height} pixels, {args.image} is {photo.width} x {photo.height}: "
                             f"they must have the same size")
        pixels = torch.from_numpy(np.array(fit_square(mask, size, args.fit, "constant")[0].convert("L"))) > 127
        region = pixels.view(side, stride, side, stride).any(3).any(1)
    elif args.inpaint is not None:
        region[side // 4:side - side // 4, side // 4:side - side // 4] = True
    else:
        where, _, fraction = args.outpaint.partition("=")
        try:
            fraction = float(fraction)
        except ValueError:
            fraction = 0.0
        if where not in ("left", "right", "up", "down") or not 0 < fraction < 1:
            raise ValueError(f"--outpaint {args.outpaint} should be left, right, up or down, = and a fraction between 0 and 1, such as right=0.5")
        count = math.ceil(fraction * side)
        rows, columns = {"left": (slice(None), slice(count)), "right": (slice(None), slice(side - count, None)),
                         "up": (slice(count), slice(None)), "down": (slice(side - count, None), slice(None))}[where]
        region[rows, columns] = True
    if not region.any():
        raise ValueError(f"nothing of {args.image} is left to repaint after --fit {args.fit}: is the {'mask black' if args.mask else 'box cut off'}?")
    return region


@torch.no_grad()
def likeliest_class(model, known, seed):
    """The class under which the known ones of the tokens (N,) are likeliest; mask_id marks the others. Returns an int.

    The known tokens come in a random order in four parts, and each part is predicted from those before it; after each,
    the likelier quarter of the classes goes on. Raises ValueError where nothing is known."""
    places = (known != model.mask_id).nonzero()[:, 0]
    if not len(places):
        raise ValueError("nothing of the image is kept that could tell its class: name one with --class")
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).to(known.device)]
    classes = torch.arange(model.config.num_classes, device=known.device)
    score = torch.zeros(len(classes), device=known.device)
    shown = torch.full_like(known, model.mask_id)
    for part in places.chunk(4):
        logits = torch.cat([model(shown.expand(len(some), -1), some)[:, part].float() for some in classes.split(64)])
        score[classes] += logits.log_softmax(-1).gather(-1, known[part].expand(len(classes), -1)[..., None]).sum((1, 2))
        classes = classes[score[classes].topk(min(len(classes), max(16, len(classes) // 4))).indices]
        shown[part] = known[part]
    return classes[score[classes].argmax()].item()


def extrapolate(transformer, tokens, labels, left, right, **options):
    """Lengthens token grids (B, side, side) by `left` and `right` columns -> a list of (B, side, left + side + right), the
    start and one for each place of the window, with mask_id where nothing is painted yet; the last one has none.

    The window of side x side tokens moves by half its width, so that half of it is known. options: as for decode."""
    B, side, _ = tokens.shape
    wide, half = left + side + right, max(1, side // 2)
    canvas = torch.full((B, side, wide), transformer.mask_id, device=tokens.device)
    canvas[:, :, left:left + side] = tokens
    starts = [min(start, left + right) for start in range(left + half, left + right + half, half)]
    starts += [max(start, 0) for start in range(left - half, -half, -half)]
    steps = [canvas.clone()]
    for start in starts:
        window = canvas[:, :, start:start + side].flatten(1)
        canvas[:, :, start:start + side] = decode(transformer, labels, known=window, **options).view(B, side, side)
        steps.append(canvas.clone())
    return steps


def composite(photo, painted, mask, feather):
    """The photo (3, H, W) where mask (H, W) is false, exactly; painted (n, 3, H, W) where it is true.

    feather: standard deviation, in pixels, of the Gaussian with which the one fades into the other, 0 for none. The released
    demo fades on both sides of the border; here all of it is on the photo's, so nothing of what was to go shines through."""
    soft = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    if feather:
        soft = soft.filter(ImageFilter.GaussianBlur(feather))
    soft = torch.from_numpy(np.array(soft)).to(photo) / 255
    if feather:
        soft = torch.where(mask, 1, (2 * soft).clamp(max=1))            # 1/2 at the border before, 1 after
    return painted * soft + photo * (1 - soft)


def manipulate(args, tokenizer, transformer, names, size, options, device):
    """-> the photo (3, H, W) in [0, 1], the mask of repainted pixels (H, W), and a list of images (num, 3, H, W), of which the
    last are the results; those before them, with --film, are the film's."""
    photo = read_image(args.image)
    fitted, square = fit_square(photo, size, args.fit)
    picture = torch.from_numpy(np.array(fitted)).to(device).movedim(-1, 0).float() / 255
    stride = tokenizer.config.stride
    with torch.no_grad():
        tokens = tokenizer.encode(picture[None])                                            # (1, side, side)
    if args.extrapolate is None:
        region = repaint_region(args, photo, square, size, stride).to(device)
        known = torch.where(region, transformer.mask_id, tokens[0])
    else:
        if args.extrapolate <= size:
            raise ValueError(f"--extrapolate {args.extrapolate} must be wider than the image, which is {size} pixels here")
        known = tokens[0]
    if args.classes:
        label, source = find_class(args.classes[0], names), "as asked"
    elif transformer.null_label is not None:
        label, source = transformer.null_label, "no --class was given"
    else:
        label, source = likeliest_class(transformer, known.flatten(), args.seed), "the likeliest for what is kept of the image"
    print(f"class: {'none' if label == transformer.null_label else names[label]} ({source})", flush=True)
    labels = torch.full((args.num,), label, device=device)

    feather = stride - 1 if args.feather is None else args.feather                          # 15 pixels in the released demo
    if args.extrapolate is None:
        images, frames = draw(tokenizer, transformer, labels, known=known.flatten().expand(args.num, -1), return_steps=args.film, **options)
        mask = to_pixels(region, tokenizer)
        return picture, mask, [composite(picture, frame, mask, feather) for frame in frames or [images]]      # the last has no grey

    before = (args.extrapolate - size) // 2                                                 # pixels to the left of the photo
    left, right = math.ceil(before / stride), math.ceil((args.extrapolate - size - before) / stride)
    parts = [extrapolate(transformer, tokens.expand(len(part), -1, -1), part, left, right, **options) for part in labels.split(64)]
    first = left * stride - before                                                          # whole tokens overhang the width
    mask = torch.ones(size, args.extrapolate, dtype=torch.bool, device=device)
    mask[:, before:before + size] = False
    wide = torch.ones(3, size, args.extrapolate, device=device)
    wide[:, :, before:before + size] = picture
    canvases, frames = [torch.cat(step) for step in zip(*parts)], []
    for canvas in canvases if args.film else canvases[-1:]:
        with torch.no_grad():        # the decoder is convolutional: it restores the whole width at once, so there are no seams
            painted = torch.cat([tokenizer.decode(one[None].clamp(max=tokenizer.config.codebook_size - 1)) for one in canvas])
        unknown = to_pixels(canvas == transformer.mask_id, tokenizer)[:, None]
        painted = torch.where(unknown, 0.5, painted)[..., first:first + args.extrapolate]
        frames.append(composite(wide, painted, mask, feather))
    return wide, mask, frames


# ------------------------------------------------------------------------------------------------------ what is asked for

def generate(args, tokenizer, transformer, names, options, device):
    """-> the images (classes * num, 3, H, W), their classes' indices, one a row, and the frames of the film."""
    rows = [find_class(text, names) for text in args.classes] if args.classes else list(range(min(10, len(names))))
    labels = torch.tensor(rows, device=device).repeat_interleave(args.num)
    images, frames = draw(tokenizer, transformer, labels, return_steps=args.film, **options)
    return images, rows, frames


def compare(args, out, folder, machine, tokenizer, transformer, names, options):
    """Figure 2 of the paper: sequential and parallel decoding of the same class, at eight moments of each; and their times."""
    sequential = load_run(folder, machine.device, args.vqgan, "autoregressive")[2]
    label = find_class(args.classes[0], names) if args.classes else 0
    labels = torch.full((args.num,), label, device=machine.device)
    rows, captions, steps, N = [], [], options["steps"], transformer.config.num_tokens
    shown = [round(i * steps / 8) for i in range(1, 9)] if steps >= 8 else range(1, steps + 1)
    for model, what, passes in ((sequential, "sequential", N), (transformer, "parallel", steps)):
        common = {name: options[name] for name in ("temperature", "top_k")} | {"generator": machine.generator(args.seed)}
        started = time.time()
        with machine.autocast():
            _, frames = draw(tokenizer, model, labels, return_steps=True, **(common if model is sequential else options | common))
        print(f"{what}: {passes} passes, {time.time() - started:.2f} s for {args.num} images")
        frames = frames if model is sequential else [frames[i - 1] for i in shown]
        rows += [torch.stack([frame[i] for frame in frames]) for i in range(min(2, args.num))]
        captions += [f"{what}, {passes} passes"] * min(2, args.num)
    titles = [f"{round((i + 1) * N / 8)} | {step}" for i, step in enumerate(shown)]
    runtime.save_image(out, runtime.grid(rows, captions, titles=titles))
    print(f"wrote {out}: {names[label]}, after as many passes of each as the titles say")


def sample(args, machine):
    if machine.rank:                                # one device draws; the others would draw and write the same
        return
    tasks = [task for task in TASKS if getattr(args, task) is not None]
    if args.num < 1:
        raise ValueError("--num must be at least 1")
    if args.image and len(tasks) != 1:
        raise ValueError(f"--image needs one of --{', --'.join(TASKS)}: what is to be done with it?")
    if tasks and not args.image:
        raise ValueError(f"--{tasks[0]} needs --image PHOTO")
    if args.image and args.classes and len(args.classes) > 1:
        raise ValueError("--image takes one --class")
    device = machine.device
    folder, tokenizer, transformer, checkpoint = load_run(args.run, device, args.vqgan, "parallel" if args.compare else args.decoder)
    causal = transformer.config.causal
    if causal and args.image:
        raise ValueError(f"{folder} holds an autoregressive transformer, which can only go on in raster order: to edit images, "
                         f"use a run trained with --decoder parallel")
    name = f"{Path(args.image).stem}.{tasks[0]}.png" if args.image else "compare.png" if args.compare else "samples.png"
    out = Path(args.out or folder / name)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out} must end in .png, .jpg or .webp")
    options = sampler_options(args, transformer) | {"generator": machine.generator(args.seed)}
    if not causal:
        options["start_step"] = args.start_step
    names = checkpoint["classes"]
    how = "token by token" if causal else f"{options['steps']} steps, {args.schedule} schedule"
    print(f"{folder}: {args.image or 'compare' if args.image or args.compare else 'samples'}, {how}, seed {args.seed}, on {device}")
    if args.compare:
        return compare(args, out, folder, machine, tokenizer, transformer, names, options)

    started = time.time()
    with machine.autocast():
        if args.image:
            photo, mask, frames = manipulate(args, tokenizer, transformer, names, checkpoint["image_size"], options, device)
            images = frames[-1]
        else:
            images, rows, frames = generate(args, tokenizer, transformer, names, options, device)
        machine.sync(alone=True)
    seconds = time.time() - started
    if args.image:
        cells = torch.cat([torch.stack([photo, torch.where(mask, 0.5, photo)]), images])
        columns = 10 if args.extrapolate is None else 1
        runtime.save_image(out, runtime.grid(list(cells.split(columns)), titles=["input", "masked"][:columns]))
        for i, image in enumerate(images, 1):
            runtime.save_image(out.with_suffix(f".{i}{out.suffix}"), Image.fromarray(runtime.to_uint8(image)))
        print(f"wrote {out} and {out.with_suffix('')}.1{out.suffix} to .{len(images)}{out.suffix} in {seconds:.1f} s")
    else:
        runtime.save_image(out, runtime.grid(list(images.split(args.num)), [names[i] for i in rows]))
        frames = [frame[::args.num] for frame in frames]                      # the film shows one image of each class
        print(f"wrote {out}: {len(images)} images in {seconds:.1f} s")
    if args.film:
        film = save_film(out, frames)
        print(f"wrote {film[0]} and {film[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampler_flags(parser)
    parser.add_argument("--class", dest="classes", nargs="+", metavar="NAME_OR_ID", help="classes to draw, a row each (default: the first ten)")
    parser.add_argument("--num", type=runtime.whole, default=8, help="images of each class, or of the photo (default: %(default)s)")
    parser.add_argument("--film", action="store_true", help="also write the decoding steps as a film strip and a GIF")
    parser.add_argument("--compare", action="store_true", help="parallel beside sequential decoding, as a film strip, for one class")
    parser.add_argument("--out", help="the picture to write (default: samples.png in the run's folder; with --image, the photo's name and what was done)")
    editing = parser.add_argument_group("image manipulation", "one of these, with --image; pixels are those of the photo")
    editing.add_argument("--image", metavar="PHOTO", help="the image to edit, of any size")
    editing.add_argument("--box", metavar="TOP,LEFT,HEIGHT,WIDTH", help="repaint this box, grown to whole tokens and one around, as --class")
    editing.add_argument("--mask", metavar="PNG", help="repaint what is white in this image")
    editing.add_argument("--inpaint", choices=["centre"], help="repaint the centre, half of the width and of the height")
    editing.add_argument("--outpaint", metavar="SIDE=FRACTION", help="repaint this share of the image at its left, right, upper (up) or lower (down) side")
    editing.add_argument("--extrapolate", type=runtime.whole, metavar="WIDTH", help="lengthen the image to both sides, up to WIDTH pixels (in pixels of the model)")
    editing.add_argument("--fit", default="crop", choices=("crop", "pad"), help="bring the photo to the model's square: crop it, or pad it with its borders (default: %(default)s)")
    editing.add_argument("--feather", type=runtime.positive, metavar="PIXELS", help="blur of the border of what is repainted, 0 for none (default: one pixel less than a token)")
    editing.add_argument("--start-step", type=runtime.whole, default=0, help="decoding steps to pass over, as much is known (the released demo: 2 of 12; default: %(default)s)")
    devices.add_machine_flags(parser)
    devices.launch(sample, parser.parse_args())


if __name__ == "__main__":
    devices.command_line(main)
