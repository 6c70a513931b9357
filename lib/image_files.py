"""Reads one image file, whatever its format, and chooses a random crop of it."""
import contextlib
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

from lib.errors import UserError

# A folder's files with other endings are not taken for images.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif",
                 ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".tga", ".pcx")
HUGE = 4_000_000                    # pixels; threads take turns with larger images, to save memory
ONE_HUGE_IMAGE_AT_A_TIME = threading.Lock()
# Silence Pillow's warnings, such as those about large images: only images over --max-pixels are
# errors.
warnings.filterwarnings("ignore", module="PIL")


def read_image(
    path: str, size: int | None = None, background: str = "white",
) -> Image.Image:
    """Returns an image file as an upright RGB image.

    size: the image may be reduced, but its shorter side not below this. background: the
    colour behind what is transparent. Raises UserError, which names the file, if it cannot be read
    as an image."""
    try:
        with Image.open(path) as image:
            if size:
                image.draft("RGB", (size, size))              # a JPEG is reduced while decoding
            huge = image.width * image.height > HUGE
            with ONE_HUGE_IMAGE_AT_A_TIME if huge else contextlib.nullcontext():
                return to_rgb(ImageOps.exif_transpose(reduced(image, size)), background)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large ({error}): reduce it; if it belongs to a data set, "
                        f"--max-pixels admits it") from error
    except MemoryError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check its name") from None
    except Exception as error:                   # Pillow raises nearly everything on broken files
        raise UserError(f"{path} is not a readable image ({type(error).__name__}: {error}): repair "
                        f"or remove it") from error


def reduced(image: Image.Image, size: int | None) -> Image.Image:
    """Returns the image, averaged over blocks as long as its shorter side is at least 2 * size."""
    factor = min(image.size) // (2 * size) if size else 1
    if factor <= 1 or image.mode not in ("L", "RGB", "RGBA"):
        return image
    if image.mode != "RGBA" and image.has_transparency_data:    # one exact colour is transparent
        return image
    return image.reduce(factor)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Returns an image of any mode as RGB, with 16-bit greys as 8-bit, on a background."""
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":                       # Pillow converts it to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(image, mask=image)
    return opaque


def to_8_bit(image: Image.Image) -> Image.Image:
    """Returns a grey image of integers or floats as "L".

    White is 65535 for 16 bits or a maximum above 255, otherwise 255, or 1 for a maximum up to 1.
    """
    pixels = np.asarray(image, np.float64)
    if image.mode.startswith("I;16") or pixels.max() > 255:
        white = 65535
    elif pixels.max() > 1:
        white = 255
    else:
        white = 1
    return Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))


def admit_pixels(most: int) -> None:
    """Lets read_image() read files of up to so many pixels."""
    Image.MAX_IMAGE_PIXELS = most / 2            # Pillow warns from here on, and refuses twice this


def random_crop(width: int, height: int, area: float, aspect: float, across: float,
                down: float) -> tuple[float, float, float, float]:
    """Returns the box (left, top, right, bottom) of RandomResizedCrop.

    It has 80 to 100% of the area (less of a long image) and an aspect ratio of 3:4 to 4:3.
    area, aspect, across, down: numbers in [0, 1) that choose the box."""
    pixels = (0.8 + 0.2 * area) * width * height
    ratio = np.exp((2 * aspect - 1) * np.log(4 / 3))
    crop_width = min(width, np.sqrt(pixels * ratio))
    crop_height = min(height, np.sqrt(pixels / ratio))
    full_width = crop_width
    crop_width = min(crop_width, crop_height * 4 / 3)
    crop_height = min(crop_height, full_width * 4 / 3)
    left = across * (width - crop_width)
    top = down * (height - crop_height)
    return left, top, left + crop_width, top + crop_height
