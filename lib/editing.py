"""Prepares a photo for editing and blends the result into it, for edit.py and demo.py: the model's
square, the region of tokens that is repainted, the class, and the border."""
import math
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from lib.errors import UserError
from maskgit import log_probability

# ------------------------------------------------------------------------------------- the square

def square_place(width: int, height: int, fit: str) -> tuple[int, int, int]:
    """Returns the (left, top, side) of the square that the model sees, in pixels of the photo.

    fit: "crop" the longer side, or "pad" the shorter one, so that left or top is negative."""
    side = min(width, height) if fit == "crop" else max(width, height)
    return (width - side) // 2, (height - side) // 2, side


def to_square(photo: Image.Image, size: int, fit: str) -> Tensor:
    """Returns a PIL image as the model takes it: (3, size, size) in [0, 1].

    fit: "crop" the longer side, or "pad" the shorter one with the pixels of the borders."""
    left, top, side = square_place(*photo.size, fit)
    if fit == "crop":
        box = (left, top, left + side, top + side)
        square = np.array(photo.resize((size, size), Image.Resampling.BICUBIC, box))
    else:                   # scaled first: the square of a long photo might not fit in memory
        width = max(1, round(photo.width * size / side))
        height = max(1, round(photo.height * size / side))
        scaled = np.array(photo.resize((width, height), Image.Resampling.BICUBIC))
        rows = ((size - height) // 2, (size - height + 1) // 2)
        columns = ((size - width) // 2, (size - width + 1) // 2)
        square = np.pad(scaled, (rows, columns, (0, 0)), "edge")
    return torch.from_numpy(square).movedim(-1, 0).float() / 255


# ------------------------------------------------------------------------------------- the region
# A region is (side, side) bool over the tokens of the square, true where they are repainted.

def box_region(box: tuple[int, ...], place: tuple[int, ...], side: int) -> Tensor:
    """Returns the tokens that a box touches and, as in the released code, one more above and on the
    left; below and on the right too if the box begins and ends at borders of tokens.

    box: (top, left, height, width) in pixels of the photo. place: what square_place() returned.
    """
    top, left, height, width = box
    square_left, square_top, square_side = place
    rows = tokens_touched(top - square_top, height, square_side, side)
    columns = tokens_touched(left - square_left, width, square_side, side)
    return rows[:, None] & columns


def tokens_touched(start: int, length: int, square_side: int, side: int) -> Tensor:
    """Returns where box_region() is true along one axis: (side,) bool.

    start: of the box, in pixels from the edge of the square; length, square_side: in pixels."""
    token = Fraction(square_side, side)                             # its width in pixels, exactly
    first = max(0, start / token)
    last = min(side, (start + length) / token)
    tokens = torch.arange(side)
    if first >= last:                                               # the crop cut the box off
        return tokens < 0
    # As released, the region ends one token after as many tokens as the box is long, but here never
    # before the last token that the box touches.
    end = max(math.floor(first) + math.floor(last - first) + 1, math.ceil(last))
    return (tokens >= math.floor(first) - 1) & (tokens < end)


def mask_region(mask: Image.Image, fit: str, side: int) -> Tensor:
    """Returns the tokens in which a mask, as large as the photo, has a white pixel."""
    left, top, square_side = square_place(*mask.size, fit)
    white = np.asarray(mask.convert("L")) > 127                 # not scaled: strokes may be thin
    region = torch.zeros(side, side, dtype=torch.bool)
    for row in range(side):
        rows = white[pixels_of_token(row, top, square_side, side)]
        for column in range(side):
            columns = pixels_of_token(column, left, square_side, side)
            region[row, column] = bool(rows[:, columns].any())
    return region


def pixels_of_token(i: int, start: int, square_side: int, side: int) -> slice:
    """Returns the pixels of the photo that token i touches, along one axis; none if it is padding.

    start, square_side: of the square, in pixels of the photo. side: of the square, in tokens."""
    first = start + i * square_side // side
    end = start + math.ceil(Fraction((i + 1) * square_side, side))
    return slice(max(0, first), max(0, end))


def centre_region(side: int) -> Tensor:
    """Returns the tokens of the centre, half of the width and of the height."""
    region = torch.zeros(side, side, dtype=torch.bool)
    margin = side // 4
    region[margin:side - margin, margin:side - margin] = True
    return region


def outpaint_region(direction: str, fraction: float, side: int) -> Tensor:
    """Returns the tokens at one side of the square. direction: left, right, up or down."""
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


# -------------------------------------------------------------------------------------- the class

def likeliest_class(model: nn.Module, known: Tensor, seed: int) -> int:
    """Returns the class that best explains the known tokens: the one of highest likelihood.

    known: (N,) int64, mask_id where a token is not known. The known tokens are split at random into
    four groups, and each group is predicted from the groups before it. After each group, only the
    likelier quarter of the classes stays in the race, but at least 16. Raises UserError if no token
    is known."""
    places = (known.cpu() != model.mask_id).nonzero()[:, 0]
    if len(places) == 0:
        raise UserError("the region covers the whole image, so nothing tells its class: choose a "
                        "class, or keep a part of the image")
    shuffle = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    places = places[shuffle].to(known.device)
    classes = torch.arange(model.config.num_classes, device=known.device)
    score = torch.zeros(len(classes), device=known.device)          # log-likelihoods
    visible = torch.full_like(known, model.mask_id)
    for group in places.chunk(4):
        for batch in classes.split(64):
            logits = model(visible.expand(len(batch), -1), batch)[:, group]     # (b, group, codes)
            log_p = log_probability(logits.float(), known[group].expand(len(batch), -1))
            score[batch] += log_p.sum(1)
        still_in = min(len(classes), max(16, len(classes) // 4))
        classes = classes[score[classes].topk(still_in).indices]
        visible[group] = known[group]
    return classes[score[classes].argmax()].item()


# -------------------------------------------------------------------------------------- the blend

MOST_FEATHER = 1000             # Pillow refuses a radius that is too large


def default_feather(stride: int) -> int:
    """Returns the feather that hides the seam: one pixel less than a token's width, the stride."""
    return stride - 1


def composite(photo: Tensor, painted: Tensor, mask: Tensor, feather: float) -> Tensor:
    """Returns the painted images where the mask is true, and the photo elsewhere: (n, 3, H, W).
    Pixels farther than 3 * feather + 1 from the mask are always the photo's.

    photo: (3, H, W). painted: (n, 3, H, W). mask: (H, W) bool. feather: the standard deviation, in
    pixels, of the Gaussian that blends the two outside the mask, 0 for none, at most MOST_FEATHER.
    Only the outside is blended (released: both sides), so that nothing that was masked shines
    through."""
    blur = ImageFilter.GaussianBlur(feather)
    blurred = Image.fromarray(mask.numpy().astype(np.uint8) * 255).filter(blur)
    weight = torch.from_numpy(np.array(blurred)) / 255                      # 1/2 at the border
    weight = torch.where(mask, 1, (2 * weight).clamp(max=1))
    return painted * weight + photo * (1 - weight)
