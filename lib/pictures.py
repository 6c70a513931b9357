"""Draws picture files: grids of images, films of the decoding, curves.

Images are floats in [0, 1] of shape (n, 3, H, W). Every file is written whole or not at all.
"""
import contextlib
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lib.errors import UserError
from lib.files import write_atomically

EXAMPLE = Path(__file__).resolve().parent.parent / "example"
SHOWN_SIDE = 64         # pixels: smaller images are enlarged to about this side
GAP = 2                 # white pixels between the images of a grid
TITLE_HEIGHT = 18
FONT_SIZE = 13
# The longest side that a file may have, in pixels. Of PNG it is 2^31 - 1.
LONGEST_SIDES = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Returns floats in [0, 1] as uint8 in [0, 255], rounded; the shape stays the same."""
    return (images.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Returns a PIL image of floats (3, H, W) in [0, 1]."""
    return Image.fromarray(to_uint8(image).movedim(0, -1).cpu().numpy())


def grey_out(images: torch.Tensor, masked: torch.Tensor, opacity: float) -> torch.Tensor:
    """Returns images (n, 3, H, W) with grey over the masked cells of a coarser grid.

    masked: (n, h, w), true where it becomes grey. opacity: 1 hides the image there entirely."""
    weight = opacity * F.interpolate(masked[:, None].to(images), images.shape[2:])
    return images * (1 - weight) + 0.5 * weight


# ------------------------------------------------------------------------------------------ grids

def load_font(texts: Sequence[str]) -> ImageFont.FreeTypeFont:
    """Returns a font for these texts: Pillow's own, or DejaVu Sans for letters beyond ASCII.

    DejaVu Sans comes with matplotlib and has Latin, Greek, Cyrillic, Arabic and Hebrew letters."""
    if "".join(texts).isascii():
        return ImageFont.load_default(FONT_SIZE)
    import matplotlib
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    if not path.exists():           # some distributions keep the fonts elsewhere
        return ImageFont.load_default(FONT_SIZE)
    return ImageFont.truetype(path, FONT_SIZE)


class GridLayout:
    """Lays out the images of a grid, in pixels.

    columns, rows: how many images there are across and down. image_size: (height, width) of each.
    captions: a text to the left of each row. titles: a text above each column. Either may be empty.
    Attributes: size, (width, height) of the whole grid; width and height of an image in it."""

    def __init__(self, columns: int, rows: int, image_size: tuple[int, int],
                 captions: Sequence[str] = (), titles: Sequence[str] = ()):
        scale = max(1, round(SHOWN_SIDE / image_size[0]))       # each pixel becomes scale x scale
        self.height = image_size[0] * scale
        self.width = image_size[1] * scale
        self.font = load_font([*captions, *titles])
        self.left = GAP
        if captions:
            self.left += 10 + max(int(self.font.getlength(caption)) for caption in captions)
        self.top = GAP
        if titles:
            self.top += TITLE_HEIGHT
        self.size = (self.x(columns), self.y(rows))

    def x(self, column: int) -> int:
        """Returns the left side of a column."""
        return self.left + column * (self.width + GAP)

    def y(self, row: int) -> int:
        """Returns the upper side of a row."""
        return self.top + row * (self.height + GAP)


def grid(rows: Sequence[torch.Tensor], captions: Sequence[str] = (),
         titles: Sequence[str] = ()) -> Image.Image:
    """Draws rows of images, a caption to the left of each row and a title above each column.

    rows: images (n, 3, H, W), one tensor a row; H and W are the same in all."""
    columns = max(len(row) for row in rows)
    layout = GridLayout(columns, len(rows), tuple(rows[0].shape[2:]), captions, titles)
    canvas = Image.new("RGB", layout.size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((layout.x(column) + 2, 2), title, "black", layout.font)
    for row, caption in enumerate(captions):
        middle = layout.y(row) + layout.height // 2
        draw.text((4, middle), caption, "black", layout.font, anchor="lm")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            shown = to_pil(image).resize((layout.width, layout.height), Image.Resampling.NEAREST)
            canvas.paste(shown, (layout.x(column), layout.y(row)))
    return canvas


# ------------------------------------------------------------------------------------------ files

def picture_path(given: str | None, folder: Path, name: str) -> Path:
    """Returns where a script writes its picture: at the path of --out, or as `name` in the run's
    folder; in the working folder for example/, which is part of the code."""
    if given is not None:
        return Path(given)
    if folder.resolve() == EXAMPLE:
        return Path(name)
    return folder / name


def picture_format(path: Path) -> str:
    """Returns Pillow's name of the format that a file's ending stands for, such as JPEG."""
    return Image.registered_extensions()[path.suffix.lower()]


def check_picture(path: Path, size: tuple[int, int], remedy: str) -> None:
    """Raises UserError if no picture of this (width, height) can be written to `path`.

    Call it before the work is done. remedy: what else the user can do, such as 'a lower --num'."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {path} has an unknown ending: it must end in .png, .jpg or .webp")
    kind = picture_format(path)
    longest = LONGEST_SIDES.get(kind, math.inf)
    if max(size) > longest:
        raise UserError(f"--out {path} would have {size[0]:,} x {size[1]:,} pixels, and a {kind} "
                        f"has at most {longest:,} along each side: use .png, or {remedy}")


def save_image(path: Path, image: Image.Image, **options) -> None:
    """Writes a PIL image in the format of the path's ending. Raises UserError if it cannot.

    options: as for PIL.Image.Image.save."""
    def write(file: BinaryIO) -> None:
        image.save(file, format=picture_format(Path(path)), **options)

    write_atomically(path, write)


def film_paths(path: Path) -> tuple[Path, Path]:
    """Returns the paths of the strip and the GIF of a film, beside the picture it belongs to."""
    return path.with_suffix(".film.png"), path.with_suffix(".film.gif")


def save_film(path: Path, frames: Sequence[torch.Tensor], titles: Sequence[str]) -> None:
    """Writes the steps of a decoding as a strip, a row for each image, and as a GIF, beside `path`.

    path: of the picture that the film belongs to. frames: images (n, 3, H, W), one tensor for each
    step; the strip shows the first eight of the n, the GIF all. titles: of the steps. Prints where
    the files are."""
    strip_path, gif_path = film_paths(path)
    steps_of_each_image = torch.stack([frame[:8] for frame in frames], 1)   # (8, steps, 3, H, W)
    save_image(strip_path, grid(list(steps_of_each_image), titles=titles))

    columns = math.ceil(math.sqrt(len(frames[0])))
    pages = [grid(frame.split(columns)) for frame in frames]
    pages += pages[-1:] * 4                                         # the result stays longer
    if max(pages[0].size) > LONGEST_SIDES["GIF"]:
        raise UserError(f"{gif_path} would be too large for a GIF, so only {strip_path} was "
                        f"written: lower --num")
    save_image(gif_path, pages[0], save_all=True, append_images=pages[1:], duration=350, loop=0)
    print(f"wrote {strip_path} and {gif_path}")


# ----------------------------------------------------------------------------------------- curves

@contextlib.contextmanager
def new_figure(path: Path, width: float = 6, height: float = 4, count: int = 1,
               layout: str = "constrained") -> Iterator[tuple]:
    """Opens a matplotlib figure that needs no screen, and at the end writes it as a PNG.

    count: how many axes it has, three in a row; width, height: of each, in inches. layout: what
    places them; "none": the caller. Yields (figure, list of axes). Raises UserError where the file
    cannot be written."""
    from matplotlib.figure import Figure
    columns = min(3, count)
    rows = math.ceil(count / 3)
    figure = Figure(figsize=(width * columns, height * rows), layout=layout)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
    yield figure, axes
    save_figure(path, figure, 110)


def save_figure(path: Path, figure: "Figure", dpi: int) -> None:  # noqa: F821 (imported late)
    """Writes a matplotlib figure as a PNG. Raises UserError if it cannot."""
    def write(file: BinaryIO) -> None:
        figure.savefig(file, format="png", dpi=dpi)

    write_atomically(path, write)


def draw_log(path: Path, log: Path) -> None:
    """Plots each column of a training log (CSV) that is not empty against the step."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {}
    for column in rows[0]:
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points and column != "step":
            curves[column] = points
    # Margins that are given and few ticks: with matplotlib's own, drawing takes 2.5 times as long.
    with new_figure(path, 4, 2.4, len(curves), layout="none") as (figure, axes):
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.045, right=0.99, bottom=0.5 / height, top=1 - 0.3 / height,
                               wspace=0.16, hspace=0.35)
        for axis, (column, points) in zip(axes, curves.items(), strict=True):
            axis.plot(*np.transpose(points), lw=1.2)
            axis.set_title(column, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=5)
        figure.supxlabel("step", fontsize=9)


def draw_curves(path: Path, curves: dict[str, dict], xlabel: str, ylabel: str,
                deviation: str) -> None:
    """Plots curves with error bars and marks the lowest point of each.

    curves: {name: {x: row}}, where a row is a dict that holds the numbers `ylabel` and `deviation`.
    """
    with new_figure(path) as (figure, (axis,)):
        for name, points in curves.items():
            xs = list(points)
            ys = [row[ylabel] for row in points.values()]
            errors = [row[deviation] for row in points.values()]
            line = axis.errorbar(xs, ys, errors, capsize=2, lw=1.2, label=name)
            lowest = min(ys)
            axis.plot(xs[ys.index(lowest)], lowest, "*", ms=11, color=line[0].get_color())
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        if len(curves) > 1:
            axis.set_xscale("log")
            ticks = sorted(set().union(*curves.values()))           # only the values that there are
            axis.set_xticks(ticks, [str(x) for x in ticks])
            axis.set_xticks([], minor=True)
            figure.legend(loc="outside right upper", fontsize=8)


def draw_accuracy(path: Path, points: Sequence[tuple[float, float]]) -> None:
    """Plots the accuracy of predicted tokens against the fraction that is masked.

    points: (fraction masked, accuracy) pairs."""
    with new_figure(path) as (_, (axis,)):
        axis.plot(*np.transpose(points), "o-", lw=1.2, ms=3)
        axis.set(xlabel="fraction of tokens masked", ylabel="accuracy on masked tokens",
                 xlim=(0, 1), ylim=0)
