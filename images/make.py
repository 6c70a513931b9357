"""Draws images/data-flow.png, the README's picture of the method: image -> tokens -> masked ->
predicted -> image, with the models in example/.

    python images/make.py
"""
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.data import open_data  # noqa: E402
from lib.files import rebuild  # noqa: E402
from maskgit import MaskGIT, mask_tokens  # noqa: E402
from vqgan import VQGAN, as_grid  # noqa: E402

IMAGE = 3               # of the validation images: a fish
SEED = 2                # of the masks: it hides about half of the tokens
GREY = (0.8, 0.8, 0.8)


def code_colours(tokenizer: VQGAN) -> Tensor:
    """Returns the mean colour of what each code decodes to, (codebook_size, 3)."""
    codes = torch.arange(tokenizer.config.codebook_size)
    grids = codes[:, None, None].expand(-1, 3, 3)               # three by three tokens of one code
    return tokenizer.decode(grids).mean((2, 3))


def show_image(axis: Axes, image: Tensor) -> None:
    """Draws an image (3, H, W)."""
    axis.imshow(image.permute(1, 2, 0))


def show_tokens(axis: Axes, tokens: Tensor, colours: Tensor, bold: Tensor, hidden: Tensor) -> None:
    """Draws a grid of tokens (h, w) as numbers, on the colours (codebook_size, 3) of their codes.

    bold, hidden: (h, w) booleans. A hidden token is grey and has no number."""
    cells = colours[tokens]                                     # (h, w, 3)
    cells[hidden] = torch.tensor(GREY)
    axis.imshow(cells)
    height, width = tokens.shape
    for row in range(height):
        for column in range(width):
            if hidden[row, column]:
                continue
            ink = "black" if cells[row, column].mean() > 0.5 else "white"
            weight = "bold" if bold[row, column] else "normal"
            axis.text(column, row, str(tokens[row, column].item()), ha="center", va="center",
                      size=6.5, color=ink, weight=weight)
    axis.set_xticks(torch.arange(0.5, width - 1).tolist())
    axis.set_yticks(torch.arange(0.5, height - 1).tolist())
    axis.grid(color="white", lw=0.8)


@torch.no_grad()
def main() -> None:
    tokenizer, _ = rebuild(ROOT / "example" / "vqgan.pt", "vqgan", VQGAN)
    transformer, _ = rebuild(ROOT / "example" / "transformer.pt", "transformer", MaskGIT)
    _, validation = open_data("shapes")
    images, labels = validation.batch(torch.tensor([IMAGE]).numpy())
    images = images.float() / 255

    tokens = tokenizer.encode(images).flatten(1)                                        # (1, N)
    generator = torch.Generator().manual_seed(SEED)
    visible, mask = mask_tokens(tokens, "cosine", transformer.mask_id, generator)
    logits = transformer(visible, labels)                                               # (1, N, K)
    predicted = torch.where(mask, logits.argmax(-1), tokens)
    restored = tokenizer.decode(as_grid(predicted))
    right = ((predicted == tokens) & mask).sum().item()
    print(f"{mask.sum().item()} of {mask.numel()} tokens are masked, of which {right} are predicted right")

    colours = code_colours(tokenizer)
    nothing = torch.zeros_like(as_grid(mask)[0])
    figure = Figure(figsize=(11.5, 2.1))
    axes = figure.subplots(1, 5)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.02, top=0.89, wspace=0.52)
    show_image(axes[0], images[0])
    show_tokens(axes[1], as_grid(tokens)[0], colours, nothing, nothing)
    show_tokens(axes[2], as_grid(tokens)[0], colours, nothing, as_grid(mask)[0])
    show_tokens(axes[3], as_grid(predicted)[0], colours, as_grid(mask)[0], nothing)
    show_image(axes[4], restored[0])

    side = images.shape[-1]
    grid = as_grid(tokens).shape[-1]
    titles = [
        f"image, {side} × {side} pixels", f"tokens, {grid} × {grid}", "masked", "predicted (bold)", "image"]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, size=10)
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
    arrows = ["VQGAN.encode", "mask_tokens", "MaskGIT", "VQGAN.decode"]
    for axis, name in zip(axes[1:], arrows, strict=True):
        axis.annotate("", (-0.04, 0.5), (-0.48, 0.5), "axes fraction", arrowprops={"arrowstyle": "->", "lw": 1.5})
        axis.text(-0.26, 0.55, name, size=7.5, family="monospace", ha="center", transform=axis.transAxes)
    figure.savefig(ROOT / "images" / "data-flow.png", dpi=100)


if __name__ == "__main__":
    main()
