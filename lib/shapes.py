"""The data set `shapes`: ten classes of objects, drawn on the fly. All can be tried without fetching a data set."""
import numpy as np
import torch

from lib.runtime import hashed_uniform

SHAPES = ["ball", "box", "cone", "fish", "ring", "cross", "heart", "moon", "house", "tree"]


def outline(name, x, y):
    """Signed distance to an object's outline, negative inside, in units of its size, y up; and to its second part.
    The second part (a roof, a tail, a trunk) gets a colour of its own; it is far away where there is none."""
    def box(x, y, w, h):
        return np.maximum(np.abs(x) - w, np.abs(y) - h)

    def wedge(x, y, top, bottom, w):                               # isosceles triangle of half width w
        slope = np.hypot(top - bottom, w)
        return np.maximum((np.abs(x) * (top - bottom) + (y - top) * w) / slope, bottom - y)

    far = np.full_like(x, 9)
    plain = {
        "ball": lambda: np.hypot(x, y) - 0.85,
        "box": lambda: box(x, y, 0.72, 0.72),
        "cone": lambda: wedge(x, y, 0.95, -0.75, 0.9),
        "ring": lambda: np.abs(np.hypot(x, y) - 0.68) - 0.24,
        "cross": lambda: np.minimum(box(x, y, 0.3, 0.9), box(x, y, 0.9, 0.3)),
        "moon": lambda: np.maximum(np.hypot(x, y) - 0.9, 0.8 - np.hypot(x - 0.6, y))}
    if name in plain:
        return plain[name](), far
    if name == "heart":                                            # a square on its corner with two half discs
        u, v = (x + y + 0.12) * 0.7071, (y - x + 0.12) * 0.7071
        discs = np.minimum(np.hypot(u - 0.55, v), np.hypot(u, v - 0.55)) - 0.55
        return np.minimum(box(u, v, 0.55, 0.55), discs), far
    if name == "fish":
        tail = wedge(y, -x, -0.2, -0.95, 0.62)
        return np.minimum((np.hypot((x + 0.22) / 0.74, y / 0.52) - 1) * 0.55, tail), tail
    if name == "house":
        roof = wedge(x, y, 0.95, 0.15, 0.95)
        return np.minimum(box(x, y + 0.3, 0.68, 0.5), roof), roof
    crown = np.minimum(wedge(x, y, 1.0, 0.15, 0.6), wedge(x, y, 0.6, -0.35, 0.8))
    trunk = box(x, y + 0.65, 0.24, 0.33)
    return np.minimum(crown, trunk), np.maximum(trunk, -crown)


def hsv_to_rgb(h, s, v):
    """Each (...) in [0, 1] -> (..., 3), each in [0, 1]."""
    k = (np.array([5, 3, 1], np.float32) + h[..., None] * 6) % 6
    return v[..., None] * (1 - s[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw_scenes(labels, uniform):
    """labels: (B,) ints below 10. uniform: (B, 13) in [0, 1). -> images (B, 32, 32, 3) uint8."""
    draws = uniform.T[..., None, None]                             # (13, B, 1, 1), to spread over the pixels

    def between(low, high, column):
        return low + (high - low) * draws[column]

    size, turn, light = between(0.7, 0.9, 0), between(-0.3, 0.3, 1), between(0, 2 * np.pi, 2)
    center_x, center_y = between(-1, 1, 3) * (1 - size), between(-1, 1, 4) * (1 - size)
    reach = size * between(0.25, 0.45, 5)                          # of the shadow
    light_x, light_y = np.cos(light), np.sin(light)
    # Pixel centres in [-1, 1], y up. What would shade a pixel lies `reach` away from it, towards the light.
    pixel_x = (np.arange(32, dtype=np.float32) + 0.5) / 16 - 1
    pixel_y = -pixel_x[:, None]
    dx = np.stack([pixel_x - center_x, pixel_x - center_x + light_x * reach]) / size           # (2, B, 1, 32)
    dy = np.stack([pixel_y - center_y, pixel_y - center_y + light_y * reach]) / size           # (2, B, 32, 1)
    x, y = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx        # (2, B, 32, 32)
    distances, second = np.empty_like(x), np.empty_like(x)
    for label in np.unique(labels):
        chosen = labels == label
        distances[:, chosen], second[:, chosen] = outline(SHAPES[label], x[:, chosen], y[:, chosen])
    # The distance beyond a sharp corner is too small, which would draw the soft shadow out into spikes.
    distance, shading = distances[0], np.maximum(distances[1], np.hypot(x[1], y[1]) - 1)
    # Anti-aliasing: a pixel is covered in proportion to its distance from the outline, within half a pixel.
    cover, cover_second = (np.clip(0.5 - part * size * 16, 0, 1)[..., None] for part in (distance, second[0]))
    shadow = np.clip(0.5 - shading * size * 4, 0, 1)[..., None] * 0.5                          # soft: 4 pixels wide

    hue = draws[6] + 0.25 + 0.5 * draws[9]                         # never the background's hue
    first_colour = hsv_to_rgb(hue, between(0.75, 0.95, 10), between(0.85, 1, 11))
    second_colour = hsv_to_rgb(hue + 0.33 + 0.33 * draws[12], np.float32(0.7), np.float32(0.6))
    ground_colour = hsv_to_rgb(draws[6], between(0.05, 0.2, 7), between(0.6, 0.8, 8))
    ground = ground_colour * (1 + 0.35 * (pixel_x * light_x + pixel_y * light_y))[..., None] * (1 - shadow)
    shade = (0.85 + 0.4 * (dx[0] * light_x + dy[0] * light_y))[..., None]
    body = (first_colour + cover_second * (second_colour - first_colour)) * shade
    return (np.clip(ground + cover * (body - ground), 0, 1) * 255 + 0.5).astype(np.uint8)


class Shapes:
    """50,000 training and 5,000 validation images, 32 x 32: image i is a pure function of (split, i), of class i % 10.
    One light falls from a random side: it grades the background, shades the object and casts its shadow the other
    way, so tokens far apart have to agree. Colour, size, position and rotation vary."""
    classes, image_size, workers = SHAPES, 32, 0

    def __init__(self, split):
        self.key, self.length = {"train": (0, 50_000), "val": (1, 5_000)}[split]

    def __len__(self):
        return self.length

    def batch(self, indices, draws=None):
        """indices: (B,) ints. Nothing is augmented, so `draws` changes nothing."""
        labels = np.asarray(indices) % len(SHAPES)
        images = torch.from_numpy(draw_scenes(labels, hashed_uniform(self.key, indices, 13)))
        return images.permute(0, 3, 1, 2), torch.from_numpy(labels).long()
