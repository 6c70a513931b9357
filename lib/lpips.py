"""The perceptual loss of stage 1: LPIPS with VGG16 (Zhang et al. 2018), with the public weights."""
import os
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import UserError
from lib.files import cache_folder, download, load_tensors, load_weights
from lib.runtime import Machine

VGG16_NAME = "vgg16-397923af.pth"   # in the cache folder
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af"           # its first digits, which are part of the name
LINEAR_NAME = "lpips-vgg.pth"
LINEAR = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
          "lpips/weights/v0.1/vgg.pth")
LINEAR_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """The perceptual distance of two images: that of their features in VGG16 (version 0.1).

    load_lpips() sets its weights, which are frozen; gradients reach the images. The convolutions
    may run under autocast; the distances are float32."""
    # Widths of the convolutions in each of the five stages, between which images are halved.
    WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential()         # numbered as in torchvision, whose names it shares
        self.compared = []                      # the layers whose outputs are compared
        inputs = 3
        for widths in self.WIDTHS:
            if self.compared:
                self.features.append(nn.MaxPool2d(2))
            for width in widths:
                self.features.append(nn.Conv2d(inputs, width, 3, padding=1))
                self.features.append(nn.ReLU(inplace=True))
                inputs = width
            self.compared.append(len(self.features) - 1)
        self.linear = nn.ParameterList(torch.zeros(widths[-1], 1, 1) for widths in self.WIDTHS)
        mean = torch.tensor([0.485, 0.456, 0.406])                      # of ImageNet's colours
        deviation = torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", deviation[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances (B,), 0 or more, of images (B, 3, H, W) in [0, 1], H, W >= 16."""
        a = (a - self.mean) / self.std
        b = (b - self.mean) / self.std
        distance = 0
        for i, layer in enumerate(self.features):
            a = layer(a)
            b = layer(b)
            if i in self.compared:
                weight = self.linear[self.compared.index(i)]            # (C, 1, 1)
                squares = (unit_length(a) - unit_length(b)).square()    # (B, C, h, w)
                distance = distance + (squares * weight).sum(1).mean((1, 2))
        return distance


def unit_length(features: Tensor) -> Tensor:
    """Scales the features (B, C, h, w) of every place to length 1."""
    return F.normalize(features.float(), dim=1, eps=1e-10)


def load_lpips_at_hand(machine: Machine) -> LPIPS | None:
    """Returns LPIPS on the machine if its weights are in the cache folder, else None."""
    folder = cache_folder()
    if all(os.path.exists(folder / name) for name in (VGG16_NAME, LINEAR_NAME)):
        return machine.place(load_lpips(offline=True))
    return None


def fetch_lpips(machine: Machine) -> LPIPS:
    """Returns LPIPS as load_lpips() does, but the first rank alone fetches what is not there."""
    with machine.first_rank_first():
        return load_lpips()


def load_lpips(offline: bool = False) -> LPIPS:
    """Returns LPIPS with its weights, from the cache folder, or fetched there first (528 MB).

    Raises UserError if they cannot be had."""
    try:
        vgg16 = download(VGG16, VGG16_NAME, VGG16_SHA256, offline)
        linear = download(LINEAR, LINEAR_NAME, LINEAR_SHA256, offline)
    except UserError as error:
        raise UserError(f"{error}. The perceptual loss needs {VGG16_NAME} (from {VGG16}) and "
                        f"{LINEAR_NAME} (from {LINEAR}) in {cache_folder()}; --perceptual none "
                        f"trains without it") from error
    weights = {}
    for name, value in load_tensors(vgg16).items():
        if name.startswith("features."):
            weights[name] = value
    for name, value in load_tensors(linear).items():    # lin0.model.1.weight (1, 64, 1, 1), ...
        stage = re.fullmatch(r"lin(\d)\.model\.1\.weight", name)
        if stage:
            weights[f"linear.{stage[1]}"] = value.squeeze(0)
    return load_weights(LPIPS(), weights, f"{vgg16} or {linear}", "delete it, to fetch it again")
