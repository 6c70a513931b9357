"""The data set `shapes`: ten classes of objects, drawn on the fly. Nothing has to be downloaded."""
import numpy as np
import torch

from lib.loader import DataSet, ImagesAndLabels
from lib.runtime import hashed_uniform

SHAPES = ["ball", "box", "cone", "fish", "ring", "cross", "heart", "moon", "house", "tree"]
FAR = 9.0                   # the distance to a second part where the object has none


class Shapes(DataSet):
    """50,000 training and 5,000 validation images, 32 x 32 or larger; image i is of class i % 10.

    It is a pure function of (split, i), drawn in the resolution that is asked for. Light falls from
    a random side: it grades the background, shades the object and casts its shadow on the other
    side, so tokens far apart have to agree. Colour, size, position and rotation vary."""

    classes = SHAPES
    workers = 0

    def __init__(self, split: str, image_size: int = 32):
        self.image_size = image_size
        self.key = {"train": 0, "val": 1}[split]
        self.length = {"train": 50_000, "val": 5_000}[split]

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: np.ndarray, seeds: np.ndarray | None = None) -> ImagesAndLabels:
        """Returns images (B, 3, S, S) uint8 and labels (B,) int64. Nothing is augmented."""
        labels = np.asarray(indices) % len(SHAPES)
        uniform = hashed_uniform(self.key, indices, 13)
        images = draw_scenes(labels, uniform, self.image_size)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


# ---- outlines: signed distances of points (x, y), y up, in units of the object's size; inside < 0

def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Returns the distance to a rectangle around (0, 0)."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def wedge(x: np.ndarray, y: np.ndarray, top: float, bottom: float, half_width: float) -> np.ndarray:
    """Returns the distance to an isosceles triangle."""
    height = top - bottom
    side = (np.abs(x) * height + (y - top) * half_width) / np.hypot(height, half_width)
    return np.maximum(side, bottom - y)


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the distance to a square that stands on its corner, with two half discs."""
    u = (x + y + 0.12) * 0.7071
    v = (y - x + 0.12) * 0.7071
    discs = np.minimum(np.hypot(u - 0.55, v), np.hypot(u, v - 0.55)) - 0.55
    return np.minimum(box(u, v, 0.55, 0.55), discs)


def outline(name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distances to an object, and to its second part, which has a colour of its own.

    The second part is a roof, a tail or a trunk; an object without one is FAR from it."""
    if name == "fish":
        tail = wedge(y, -x, -0.2, -0.95, 0.62)
        body = (np.hypot((x + 0.22) / 0.74, y / 0.52) - 1) * 0.55
        return np.minimum(body, tail), tail
    if name == "house":
        roof = wedge(x, y, 0.95, 0.15, 0.95)
        return np.minimum(box(x, y + 0.3, 0.68, 0.5), roof), roof
    if name == "tree":
        crown = np.minimum(wedge(x, y, 1.0, 0.15, 0.6), wedge(x, y, 0.6, -0.35, 0.8))
        trunk = box(x, y + 0.65, 0.24, 0.33)
        return np.minimum(crown, trunk), np.maximum(trunk, -crown)
    return simple_outline(name, x, y), np.full_like(x, FAR)


def outlines(labels: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns outline() for points (2, B, H, W) of B objects of these labels."""
    distances = np.empty_like(x)
    second = np.empty_like(x)
    for label in np.unique(labels):
        chosen = labels == label
        distances[:, chosen], second[:, chosen] = outline(SHAPES[label], x[:, chosen], y[:, chosen])
    return distances, second


def simple_outline(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the distances to an object of one part."""
    if name == "ball":
        return np.hypot(x, y) - 0.85
    if name == "box":
        return box(x, y, 0.72, 0.72)
    if name == "cone":
        return wedge(x, y, 0.95, -0.75, 0.9)
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.68) - 0.24
    if name == "cross":
        return np.minimum(box(x, y, 0.3, 0.9), box(x, y, 0.9, 0.3))
    if name == "heart":
        return heart(x, y)
    if name == "moon":
        return np.maximum(np.hypot(x, y) - 0.9, 0.8 - np.hypot(x - 0.6, y))
    raise ValueError(f"no shape is called {name}")


# ---- scenes

def hsv_to_rgb(h: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Converts colours, each argument (...) in [0, 1], to (..., 3) in [0, 1]."""
    k = (np.array([5, 3, 1], np.float32) + h[..., None] * 6) % 6
    return v[..., None] * (1 - s[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw_scenes(labels: np.ndarray, uniform: np.ndarray, image_size: int = 32) -> np.ndarray:
    """Returns images (B, S, S, 3) uint8.

    labels: (B,) ints below 10. uniform: (B, 13) in [0, 1), which decides everything else.
    image_size: S."""
    draws = uniform.T[..., None, None]                             # (13, B, 1, 1)

    def between(low: float, high: float, column: int) -> np.ndarray:
        return low + (high - low) * draws[column]

    size = between(0.7, 0.9, 0)
    turn = between(-0.3, 0.3, 1)
    light = between(0, 2 * np.pi, 2)
    center_x = between(-1, 1, 3) * (1 - size)
    center_y = between(-1, 1, 4) * (1 - size)
    shadow_length = size * between(0.25, 0.45, 5)
    light_x = np.cos(light)
    light_y = np.sin(light)

    # Pixel centres in [-1, 1], y up, relative to the object and (second) to its shadow, which falls
    # on a pixel if the object is `shadow_length` away from it towards the light.
    half = image_size / 2                                          # pixels in a unit of length
    pixel_x = (np.arange(image_size, dtype=np.float32) + 0.5) / half - 1
    pixel_y = -pixel_x[:, None]
    dx = pixel_x - center_x                                        # (B, 1, S)
    dy = pixel_y - center_y                                        # (B, S, 1)
    dx = np.stack([dx, dx + light_x * shadow_length]) / size       # (2, B, 1, S)
    dy = np.stack([dy, dy + light_y * shadow_length]) / size       # (2, B, S, 1)
    x = np.cos(turn) * dx + np.sin(turn) * dy                      # (2, B, S, S)
    y = np.cos(turn) * dy - np.sin(turn) * dx
    distances, second = outlines(labels, x, y)

    # Anti-aliasing: a pixel is covered in proportion to its distance from the outline, within half
    # a pixel. The shadow is softer, over an eighth of the image. Beyond a sharp corner the distance
    # is too small, which would give the shadow spikes: hence the circle around it.
    to_shadow = np.maximum(distances[1], np.hypot(x[1], y[1]) - 1)
    cover = np.clip(0.5 - distances[0] * size * half, 0, 1)[..., None]
    cover_second = np.clip(0.5 - second[0] * size * half, 0, 1)[..., None]
    shadow = np.clip(0.5 - to_shadow * size * 4, 0, 1)[..., None] * 0.5

    hue = draws[6] + 0.25 + 0.5 * draws[9]                         # never the background's hue
    first_colour = hsv_to_rgb(hue, between(0.75, 0.95, 10), between(0.85, 1, 11))
    second_colour = hsv_to_rgb(hue + 0.33 + 0.33 * draws[12], np.float32(0.7), np.float32(0.6))
    ground_colour = hsv_to_rgb(draws[6], between(0.05, 0.2, 7), between(0.6, 0.8, 8))
    slope = 0.35 * (pixel_x * light_x + pixel_y * light_y)         # brighter towards the light
    ground = ground_colour * (1 + slope)[..., None] * (1 - shadow)
    shade = (0.85 + 0.4 * (dx[0] * light_x + dy[0] * light_y))[..., None]
    body = (first_colour + cover_second * (second_colour - first_colour)) * shade
    image = ground + cover * (body - ground)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
