"""What edit.py and demo.py both need: a photo as the model's square, the class that is painted, the composite."""
import numpy as np
import torch
from PIL import Image, ImageFilter

from lib.data import find_class
from lib.flags import UserError


def fit_square(image, size, fit, padding="edge"):
    """Brings a PIL image to size x size. fit: crop its centre, or pad its shorter side (padding: as for numpy.pad).

    Returns the PIL image, and (left, top, side) of the square in pixels of the image, negative where it is padded."""
    width, height = image.size
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if fit == "pad":
        margins = ((-top, side - height + top), (-left, side - width + left), (0, 0))
        image, box = Image.fromarray(np.pad(np.asarray(image), margins, padding)), (0, 0, side, side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), (left, top, side)


def to_square(photo, size, fit):
    """A PIL image as the model takes it: (3, size, size) in [0, 1]. fit: as for fit_square()."""
    return torch.from_numpy(np.array(fit_square(photo, size, fit)[0])).movedim(-1, 0).float() / 255


def choose_class(args, transformer, names, known):
    """The class that is painted -> (its index, its name and why it was chosen). Raises ValueError."""
    if args.class_name is not None:
        label = find_class(args.class_name, names)
        return label, f"{names[label]} (as asked)"
    label = likeliest_class(transformer, known.flatten(), args.seed)
    return label, f"{names[label]} (the likeliest for what is kept of the image)"


def likeliest_class(model, known, seed):
    """The class under which the known ones of the tokens (N,) are likeliest; mask_id marks the others. Returns an int.

    The known tokens come in a random order in four parts, and each part is predicted from those before it; after each,
    the likelier quarter of the classes goes on. Raises ValueError where nothing is known."""
    places = (known.cpu() != model.mask_id).nonzero()[:, 0]
    if not len(places):
        raise UserError("nothing of the image is kept that could tell its class: name one with --class")
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))].to(known.device)
    classes = torch.arange(model.config.num_classes, device=known.device)
    score = torch.zeros(len(classes), device=known.device)                      # the log-likelihood of each class
    shown = torch.full_like(known, model.mask_id)
    for part in places.chunk(4):
        logits = torch.cat([model(shown.expand(len(some), -1), some)[:, part].float() for some in classes.split(64)])
        score[classes] += logits.log_softmax(-1)[:, torch.arange(len(part)), known[part]].sum(1)
        classes = classes[score[classes].topk(min(len(classes), max(16, len(classes) // 4))).indices]
        shown[part] = known[part]
    return classes[score[classes].argmax()].item()


def composite(photo, painted, mask, feather):
    """The photo (3, H, W) where mask (H, W) is false, exactly; painted (n, 3, H, W) where it is true.

    feather: standard deviation, in pixels, of the Gaussian with which the one fades into the other, 0 for none: on the
    photo's side of the border (released: on both), so that nothing of what was to go shines through."""
    blurred = Image.fromarray(mask.numpy().astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(feather))
    halved = torch.from_numpy(np.array(blurred)) / 255                          # 1/2 at the border
    share = torch.where(mask, 1, (2 * halved).clamp(max=1))
    return painted * share + photo * (1 - share)
