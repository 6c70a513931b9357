"""The perceptual loss of stage 1: LPIPS with VGG16 (Zhang et al. 2018), with the public weights."""
import torch
import torch.nn.functional as F
from torch import nn

from lib.files import cache_folder, download, load_tensors, load_weights
from lib.flags import UserError

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
LINEAR = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LINEAR_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """The perceptual distance of two images (Zhang et al. 2018, version 0.1): that of their features in VGG16.

    (B, 3, H, W) twice, in [0, 1], H and W at least 16 -> (B,), 0 or more. Its weights, which load_lpips() sets, are
    frozen; gradients reach the images. The convolutions may run under autocast, the distances are float32."""
    WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)

    def __init__(self):
        super().__init__()
        layers, width, self.taps = [], 3, []
        for widths in self.WIDTHS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for outputs in widths:
                layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                width = outputs
            self.taps.append(len(layers) - 1)               # features are compared before each pooling
        self.features = nn.Sequential(*layers)              # numbered as torchvision's, whose names it shares
        self.linear = nn.ParameterList(torch.zeros(widths[-1], 1, 1) for widths in self.WIDTHS)
        # Mean and deviation of ImageNet's colours.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        a, b, distance = (a - self.mean) / self.std, (b - self.mean) / self.std, 0
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in self.taps:
                u, v = (F.normalize(x.float(), dim=1, eps=1e-10) for x in (a, b))           # each pixel's to length 1
                distance = distance + ((u - v).square() * self.linear[self.taps.index(i)]).sum(1).mean((1, 2))
        return distance


def load_lpips(offline=False):
    """LPIPS with its weights, from the cache folder or fetched there (528 MB). Raises OSError or ValueError."""
    try:
        vgg16 = download(VGG16, "vgg16-397923af.pth", "397923af", offline)              # its name has its checksum
        linear = download(LINEAR, "lpips-vgg.pth", LINEAR_SHA256, offline)
    except OSError as error:
        raise UserError(f"{error}. The perceptual loss needs vgg16-397923af.pth (from {VGG16}) and lpips-vgg.pth "
                      f"(from {LINEAR}) in {cache_folder()}; --perceptual none trains without") from error
    weights = {name: value for name, value in load_tensors(vgg16).items() if name.startswith("features.")}
    for name, value in load_tensors(linear).items():        # they are called lin0.model.1.weight (1, 64, 1, 1), ...
        weights[f"linear.{name[3:4]}"] = value.squeeze(0)
    return load_weights(LPIPS(), weights, f"{vgg16} or {linear}")
