"""Draws the README's picture of the method: image -> tokens -> masked -> predicted -> image."""
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lib.pictures import save_figure
from maskgit import MaskGIT, mask_tokens
from vqgan import VQGAN, as_grid

SEED = 2                # of the mask: it hides about half of the tokens
NUMBERED_SIDE = 10      # tokens: the numbers of a larger grid could not be read
GREY = torch.tensor([0.8, 0.8, 0.8])


@torch.no_grad()
def draw_data_flow(
    path: Path, image: Tensor, label: int, tokenizer: VQGAN, transformer: MaskGIT,
) -> None:
    """Sends an image (3, S, S) through both models, and draws every stage of the way."""
    tokens = tokenizer.encode(image[None]).flatten(1)                           # (1, N)
    generator = torch.Generator().manual_seed(SEED)
    visible, mask = mask_tokens(tokens, "cosine", transformer.mask_id, generator)
    logits = transformer(visible, torch.tensor([label]))                        # (1, N, K)
    predicted = torch.where(mask, logits.argmax(-1), tokens)
    restored = tokenizer.decode(as_grid(predicted))

    right = ((predicted == tokens) & mask).sum()
    print(f"data-flow: {right} of {mask.sum()} masked tokens are predicted exactly")
    draw(path, image, as_grid(tokens)[0], as_grid(mask)[0], as_grid(predicted)[0], restored[0],
         code_colours(tokenizer))


def code_colours(tokenizer: VQGAN) -> Tensor:
    """Returns the mean colour of what each code decodes to, (codebook_size, 3)."""
    codes = torch.arange(tokenizer.config.codebook_size)
    grids = codes[:, None, None].expand(-1, 3, 3)               # three by three tokens of one code
    return tokenizer.decode(grids).mean((2, 3))


def draw(
    path: Path, image: Tensor, tokens: Tensor, mask: Tensor, predicted: Tensor, restored: Tensor,
    colours: Tensor,
) -> None:
    """Writes the picture. image, restored: (3, H, W); tokens, mask, predicted: (h, w)."""
    figure = Figure(figsize=(11.5, 2.1))
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.02, top=0.89, wspace=0.52)
    axes = figure.subplots(1, 5)
    none = torch.zeros_like(mask)
    predicted_title = "predicted (bold)" if is_numbered(mask) else "predicted (framed)"
    draw_image(axes[0], image, f"image, {image.shape[1]} × {image.shape[2]} pixels")
    draw_tokens(axes[1], tokens, colours, none, none, f"tokens, {mask.shape[0]} × {mask.shape[1]}")
    draw_tokens(axes[2], tokens, colours, none, mask, "masked")
    draw_tokens(axes[3], predicted, colours, mask, none, predicted_title)
    draw_image(axes[4], restored, "image")
    draw_arrow(axes[1], "VQGAN.encode")
    draw_arrow(axes[2], "mask_tokens")
    draw_arrow(axes[3], "MaskGIT")
    draw_arrow(axes[4], "VQGAN.decode")
    save_figure(path, figure, dpi=100)


def draw_image(axis: Axes, image: Tensor, title: str) -> None:
    """Draws an image (3, H, W)."""
    axis.imshow(image.permute(1, 2, 0))
    axis.set_title(title, size=10)
    axis.set_xticks([])
    axis.set_yticks([])


def draw_tokens(
    axis: Axes, tokens: Tensor, colours: Tensor, bold: Tensor, hidden: Tensor, title: str,
) -> None:
    """Draws a grid of tokens (h, w), as numbers if it is small, on the colours (codebook_size, 3)
    of their codes.

    bold, hidden: (h, w) booleans. A hidden token is grey and shows no number; a bold one has a
    frame in a grid without numbers."""
    cells = colours[tokens]                                                     # (h, w, 3)
    cells[hidden] = GREY
    axis.imshow(cells)
    axis.set_title(title, size=10)
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.set_xticks(np.arange(0.5, tokens.shape[1] - 1))        # lines between the tokens
    axis.set_yticks(np.arange(0.5, tokens.shape[0] - 1))
    axis.grid(color="white", lw=0.8)
    for row, column in (~hidden).nonzero().tolist():
        ink = "black" if cells[row, column].mean() > 0.5 else "white"
        if is_numbered(tokens):
            weight = "bold" if bold[row, column] else "normal"
            axis.text(column, row, str(tokens[row, column].item()), ha="center", va="center",
                      size=6.5, color=ink, weight=weight)
        elif bold[row, column]:
            corner = column - 0.25, row - 0.25
            axis.add_patch(Rectangle(corner, 0.5, 0.5, fill=False, edgecolor=ink, lw=0.6))


def is_numbered(grid: Tensor) -> bool:
    """Returns True if the numbers of a grid of tokens (h, w) are large enough to be read."""
    return len(grid) <= NUMBERED_SIDE


def draw_arrow(axis: Axes, function: str) -> None:
    """Draws an arrow that enters a panel from the left, and names the function it stands for."""
    axis.annotate("", (-0.04, 0.5), (-0.48, 0.5), "axes fraction",
                  arrowprops={"arrowstyle": "->", "lw": 1.5})
    axis.text(-0.26, 0.55, function, size=7.5, family="monospace", ha="center",
              transform=axis.transAxes)
