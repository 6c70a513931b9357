"""What a person sees: progress lines and tables on the terminal; grids, films and curves in files.

Images are (n, 3, H, W) floats in [0, 1]. Every file is written whole or not at all.
"""
import contextlib
import csv
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lib.files import write_atomically
from lib.flags import UserError


def to_uint8(images):
    """Floats in [0, 1] -> uint8 of the same shape, as they would be in a file."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def to_pil(image):
    """(3, H, W) floats in [0, 1] -> a PIL image."""
    return Image.fromarray(to_uint8(image).movedim(0, -1).cpu().numpy())


def grid(rows, captions=(), titles=()):
    """A PIL image of rows of pictures, a caption to the left of each row and a title above each column.

    rows: a list of images (n, 3, H, W). Each pixel is repeated as often as brings a picture to about 64 pixels."""
    height, width = rows[0].shape[2:]
    scale, gap, font = max(1, round(64 / height)), 2, ImageFont.load_default(13)
    height, width = height * scale, width * scale
    left = gap + max((int(font.getlength(caption)) + 10 for caption in captions), default=0)
    top = gap + (18 if titles else 0)
    size = left + (width + gap) * max(map(len, rows)), top + (height + gap) * len(rows)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        draw.text((left + i * (width + gap) + 2, 2), title, "black", font)
    for j, caption in enumerate(captions):
        draw.text((4, top + j * (height + gap) + height // 2 - 8), caption, "black", font)
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            picture = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + i * (width + gap), top + j * (height + gap)))
    return canvas


def picture_path(path):
    """The path of a picture that is to be written. Raises ValueError for an ending that is none of a picture's."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {path} must end in .png, .jpg or .webp")
    return Path(path)


def save_image(path, image, **options):
    """Writes a PIL image atomically, in the format of the path's ending. Raises OSError."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    write_atomically(path, lambda file: image.save(file, format=kind, **options))


def restore(tokenizer, tokens, masked, grey=0.85, batch=64):
    """Tokens (n, h, w) -> images (n, 3, H, W), decoded `batch` at a time, with a share `grey` of 50% grey over the
    tokens that are still masked, a mask (n, h, w)."""
    images = torch.cat([tokenizer.decode(part) for part in tokens.split(batch)])
    share = grey * F.interpolate(masked[:, None].to(images), images.shape[2:])
    return images * (1 - share) + 0.5 * share


def save_film(path, frames):
    """Writes the decoding steps as a strip (a row an image) and as a GIF beside `path`, and prints where.

    frames: images (n, 3, H, W), one tensor a step."""
    strip, gif = path.with_suffix(".film.png"), path.with_suffix(".film.gif")
    save_image(strip, grid(list(torch.stack(frames, 1)[:8]), titles=[f"step {t + 1}" for t in range(len(frames))]))
    across = math.isqrt(len(frames[0]) - 1) + 1
    pages = [grid(list(frame.split(across))) for frame in frames]
    # The last page stays a little longer than the others.
    save_image(gif, pages[0], save_all=True, append_images=pages[1:] + pages[-1:] * 4, duration=350, loop=0)
    print(f"wrote {strip} and {gif}")


@contextlib.contextmanager
def new_figure(path, width=6, height=4, count=1):
    """with new_figure(path) as (figure, axes): a matplotlib figure that needs no screen, and a list of its axes, three
    in a row, each of this size in inches. At the end it is written as PNG, atomically. Raises OSError."""
    from matplotlib.figure import Figure
    across, down = min(3, count), math.ceil(count / 3)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = [figure.add_subplot(down, across, i + 1) for i in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
    yield figure, axes
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_log(path, log):
    """Plots every column of a training log (CSV) against the step, those that hold anything."""
    rows = list(csv.DictReader(Path(log).read_text().splitlines()))
    columns = [name for name in rows[0] if name != "step" and any(row[name] for row in rows)]
    with new_figure(path, 4, 2.4, len(columns)) as (figure, axes):
        for axis, column in zip(axes, columns):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            axis.plot(*zip(*points), lw=1.2)
            axis.set_title(column, fontsize=9)
            axis.tick_params(labelsize=7)
        figure.supxlabel("step", fontsize=9)


def draw_curves(path, curves, xlabel, ylabel, deviation):
    """Plots ylabel against xlabel, a curve each with error bars, and marks the lowest point of each curve.

    curves: {name: {x: row}}; of a row, a dict, the values under ylabel and `deviation` are plotted."""
    with new_figure(path) as (figure, (axis,)):
        for name, points in curves.items():
            xs, ys = list(points), [row[ylabel] for row in points.values()]
            line = axis.errorbar(xs, ys, [row[deviation] for row in points.values()], capsize=2, lw=1.2, label=name)
            lowest = min(ys)
            axis.plot(xs[ys.index(lowest)], lowest, "*", ms=11, color=line[0].get_color())
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        if len(curves) > 1:
            axis.set_xscale("log")
            axis.set_xticks(xs, map(str, xs))                                   # no ticks but those of the values
            axis.set_xticks([], minor=True)
            figure.legend(loc="outside right upper", fontsize=8)


def draw_accuracy(path, points):
    """Token accuracy against the share of masked tokens. points: [(share, accuracy), ...]."""
    with new_figure(path) as (_, (axis,)):
        axis.plot(*zip(*points), "o-", lw=1.2, ms=3)
        axis.set(xlabel="masked tokens, share", ylabel="masked tokens predicted right, share", xlim=(0, 1), ylim=0)
