"""What edit.py and demo.py share: crop a photo to the model's square, choose a class, blend."""
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from lib.flags import UserError


def fit_square(
    image: Image.Image, size: int, fit: str, padding: str = "edge",
) -> tuple[Image.Image, tuple[int, int, int]]:
    """Scales a PIL image to size x size: crops its longer side, or pads its shorter one.

    fit: "crop" or "pad". padding: a mode of numpy.pad. Returns the image, and (left, top, side) of
    the square in pixels of the original; left or top is negative where the image was padded."""
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    box = (left, top, left + side, top + side)
    if fit == "pad":
        rows = (-top, side - height + top)
        columns = (-left, side - width + left)
        image = Image.fromarray(np.pad(np.asarray(image), (rows, columns, (0, 0)), padding))
        box = (0, 0, side, side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), (left, top, side)


def to_square(photo: Image.Image, size: int, fit: str) -> Tensor:
    """Returns a PIL image as the model takes it: (3, size, size) in [0, 1]. fit: crop or pad."""
    square, _ = fit_square(photo, size, fit)
    return torch.from_numpy(np.array(square)).movedim(-1, 0).float() / 255


def default_feather(stride: int) -> int:
    """Returns the blur of an edit's border, in pixels, that hides the seam: a token's width less 1.

    stride: the width of a token in pixels."""
    return stride - 1


def likeliest_class(model: nn.Module, known: Tensor, seed: int) -> int:
    """Returns the class that best explains the known tokens: the one of highest likelihood.

    known: (N,) int64, mask_id where a token is not known. The known tokens are split at random into
    four groups, and each group is predicted from the groups before it. After each group, only the
    likelier quarter of the classes stays in the race. Raises UserError if no token is known."""
    places = (known.cpu() != model.mask_id).nonzero()[:, 0]
    if len(places) == 0:
        raise UserError("the region covers the whole image, so nothing tells its class: name one "
                        "with --class, or keep a part of the image")
    shuffle = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    places = places[shuffle].to(known.device)
    classes = torch.arange(model.config.num_classes, device=known.device)
    score = torch.zeros(len(classes), device=known.device)              # log-likelihoods
    visible = torch.full_like(known, model.mask_id)
    for group in places.chunk(4):
        logits = torch.cat([
            model(visible.expand(len(batch), -1), batch)[:, group].float()
            for batch in classes.split(64)
        ])                                                          # (classes, group, codes)
        log_p = logits.log_softmax(-1)[:, torch.arange(len(group)), known[group]]
        score[classes] += log_p.sum(1)
        still_in = min(len(classes), max(16, len(classes) // 4))
        classes = classes[score[classes].topk(still_in).indices]
        visible[group] = known[group]
    return classes[score[classes].argmax()].item()


def composite(photo: Tensor, painted: Tensor, mask: Tensor, feather: float) -> Tensor:
    """Returns the painted images where the mask is true, and the photo elsewhere: (n, 3, H, W).

    photo: (3, H, W). painted: (n, 3, H, W). mask: (H, W) bool. feather: the standard deviation, in
    pixels, of the Gaussian that blends the two outside of the mask, 0 for none. Only the outside is
    blended (released: both sides), so that nothing of what was masked shines through. Pixels more
    than 3 * feather + 1 away from the mask are exactly the photo's."""
    blur = ImageFilter.GaussianBlur(feather)
    blurred = Image.fromarray(mask.numpy().astype(np.uint8) * 255).filter(blur)
    weight = torch.from_numpy(np.array(blurred)) / 255                      # 1/2 at the border
    weight = torch.where(mask, 1, (2 * weight).clamp(max=1))
    return painted * weight + photo * (1 - weight)
