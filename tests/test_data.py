"""The data sets: drawn, from an archive, and from folders as untidy as real ones; files that are whole or not there."""
import colorsys
import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VQ, run
from PIL import Image

from lib import data, folders, image_files, runtime, scan, shapes, terminal
from lib.data import Cifar10, check_run_outside_data, find_class, open_data, resolve_data
from lib.errors import UserError, command_line
from lib.files import load_tensors, write_atomically
from lib.image_files import random_crop, read_image, to_rgb
from lib.imagenet import SYNSETS, label_flat
from lib.loader import ShuffledBatches, training_batches
from lib.shapes import Shapes, draw_scenes, hsv_to_rgb

RED = (220, 20, 30)


def picture(path, size=(40, 30), mode="RGB", color=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_folder(root, counts, **options):
    for name, count in counts.items():
        for i in range(count):
            picture(root / name / f"{i:03}.png", **options)
    return root


def paths(folder):
    """The files of a folder's images, in order."""
    return [folder.path(index) for index in range(len(folder))]


# ---- shapes

def test_shapes_are_a_pure_function_of_split_and_index():
    train, val = Shapes("train"), Shapes("val")
    assert (len(train), len(val)) == (50_000, 5_000)
    images, labels = train.batch(range(100, 140))
    alone, label = train.batch([117])
    assert torch.equal(alone[0], images[17]) and label == labels[17] == 7
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert not torch.equal(val.batch([117])[0], alone)


def test_a_data_set_has_the_size_that_is_asked_for(monkeypatch):
    monkeypatch.setitem(data.DATA_SETS, "digits", lambda size, folder: (Shapes("train", 28), Shapes("val", 28)))
    assert open_data("digits", 28)[0].image_size == 28
    with pytest.raises(UserError, match="28 pixels, not 32: give --image-size 28"):
        open_data("digits", 32)


def test_larger_shapes_are_the_same_scenes():
    """Halved, they differ only along outlines, which are smoothed within a pixel of their own size."""
    small, _ = Shapes("val").batch(np.arange(40))
    large, labels = Shapes("val", 64).batch(np.arange(40))
    assert large.shape == (40, 3, 64, 64) and labels.tolist() == [i % 10 for i in range(40)]
    difference = (torch.nn.functional.avg_pool2d(large.float(), 2) - small.float()).abs()
    assert difference.mean() < 1 and difference.median() <= 1


def test_shapes_vary_and_are_shaded():
    images, labels = Shapes("train").batch(range(2000))
    assert torch.bincount(labels).tolist() == [200] * 10
    assert len(torch.unique(images.flatten(1), dim=0)) == 2000
    # Anti-aliased and graded: far more colours in an image than two flat ones.
    assert min(len(torch.unique(image.flatten(1).T, dim=0)) for image in images[:50]) > 150


def test_hashed_uniform_is_uniform():
    u = runtime.hashed_uniform(1, range(20_000), 4)
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.std() - 12 ** -0.5) < 0.005
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03 and abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.03


def test_one_light_grades_shades_and_casts_the_shadow():
    """A box in the middle, lit from the right and from the left: what is seen along the middle row."""
    uniform = np.full((2, 13), 0.5, np.float32)
    uniform[:, 2] = 0, 0.5                                  # of a full turn
    images = draw_scenes(np.array([1, 1]), uniform).astype(float).mean(-1)
    right, left = images[0, 16], images[1, 16]
    assert np.abs(right - left[::-1]).max() <= 2
    assert right[31] > 1.5 * right[0]                       # the background is brighter towards the light
    assert right[22] > 1.2 * right[9]                       # and so is the box
    assert right[5] < 0.65 * right[0] and right[26] > 0.9 * right[30]       # the shadow lies on its other side alone


def hue_of(pixel):
    return colorsys.rgb_to_hsv(*(pixel / 255))[0]


def test_objects_and_their_parts_stand_out():
    hues = np.random.default_rng(0).random((3, 50), np.float32)
    expected = [colorsys.hsv_to_rgb(*map(float, color)) for color in hues.T]
    assert np.allclose(hsv_to_rgb(*hues), expected, atol=1e-5)

    uniform = np.random.default_rng(1).random((40, 13), np.float32)
    uniform[:, [1, 3, 4]] = 0.5                             # houses, upright in the middle
    for image in draw_scenes(np.full(40, shapes.SHAPES.index("house")), uniform).astype(float):
        wall, roof, ground = (hue_of(image[row, 16]) for row in (21, 9, 1))
        for one, other in ((wall, ground), (wall, roof)):
            assert 0.2 < abs(one - other) < 0.8             # never alike, on the circle of hues


def test_position_and_rotation_follow_their_draws():
    uniform = np.full((5, 13), 0.5, np.float32)
    uniform[1:3, 1] = 0, 1                                  # turned one way and the other
    uniform[3, 3], uniform[4, 4] = 1, 1                     # moved to the right, and up
    plain, one_way, other_way, right, up = draw_scenes(np.full(5, 2), uniform).astype(float)
    assert np.abs(one_way - plain).max() > 50 and np.abs(one_way - other_way).max() > 50
    assert np.abs(right - plain)[:, 28].max() > 20 and np.abs(up - plain)[2].max() > 20


# ---- the stream

def test_batches_visit_every_image_once_an_epoch_and_start_anywhere():
    class Indices:
        workers = 0
        def __len__(self): return 10
        def batch(self, indices, seeds): return torch.tensor(indices), torch.tensor(seeds)
    whole = list(training_batches(Indices(), 4, 7, 0, 10))
    order = torch.cat([indices for indices, _ in whole])
    for epoch in order.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert len(set(torch.cat([seeds for _, seeds in whole]).tolist())) == 40
    later = list(training_batches(Indices(), 4, 7, 6, 10))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[6:], later, strict=True))
    other = list(training_batches(Indices(), 4, 8, 0, 10))
    assert not torch.equal(order, torch.cat([indices for indices, _ in other]))
    seeds, others = (set(torch.cat([seeds for _, seeds in stream]).tolist()) for stream in (whole, other))
    assert not seeds & others


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_divide_each_batch(world):
    """Side by side, what the ranks get is the batch of one process: images and seeds, also over the end of an epoch."""
    class Indices:
        workers = 0
        def __len__(self): return 10
        def batch(self, indices, seeds): return np.stack([indices, seeds])
    whole, shares = ShuffledBatches(Indices(), 6, 7), [ShuffledBatches(Indices(), 6, 7, rank, world) for rank in range(world)]
    for step in (0, 1, 2, 5):
        assert np.array_equal(np.concatenate([share[step] for share in shares], 1), whole[step])


# ---- CIFAR-10

def cifar_archive(path):
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    records = {name: rng.integers(0, 256, (5, 3073), dtype=np.uint8) for name in names}
    files = {name: record.tobytes() for name, record in records.items()} | {"batches.meta.txt": b"airplane\nbird\n\n"}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return records


def test_cifar_is_read_from_its_records(tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    records = cifar_archive(path)
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    train = Cifar10("train", tmp_path)
    assert train.classes == ["airplane", "bird"] and train.images.shape == (25, 3, 32, 32)
    assert np.array_equal(train.images[6], records["data_batch_2.bin"][1, 1:].reshape(3, 32, 32))
    assert train.labels[6] == records["data_batch_2.bin"][1, 0]
    assert len(Cifar10("val", tmp_path)) == 5


def test_cifar_is_flipped_in_training_only(tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(path)
    with pytest.raises(ValueError, match="wrong checksum.*delete it"):
        Cifar10("train", tmp_path)
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    train, val = open_data("cifar10", data_dir=tmp_path)
    assert (len(train), len(val), train.image_size) == (25, 5, 32)
    indices = np.arange(100) % 25
    plain, labels = train.batch(indices)
    assert np.array_equal(plain, train.images[indices]) and np.array_equal(labels, train.labels[indices])
    assert np.array_equal(val.batch(np.arange(5))[0], val.images)
    augmented, labels = train.batch(indices, np.arange(100))
    flipped = (augmented == plain.flip(3)).flatten(1).all(1)
    assert 30 < flipped.sum() < 70 and torch.equal(augmented[~flipped], plain[~flipped])
    assert np.array_equal(labels, train.labels[indices])
    assert torch.equal(train.batch(indices, np.arange(100))[0], augmented)


# ---- folders

@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "HSV", "I", "I;16", "I;16B", "F"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    grey = Image.new("L", (8, 8), 128)
    if mode in ("I", "I;16", "I;16B"):
        image = Image.fromarray(np.full((8, 8), 128 * 257, np.int32 if mode == "I" else np.uint16))
        image = image if mode != "I;16B" else image.convert("I").convert("I;16B")
    elif mode == "La":
        image = Image.new("LA", (8, 8), (128, 255)).convert("La")
    elif mode == "RGBa":
        image = Image.new("RGBA", (8, 8), (128, 128, 128, 255)).convert("RGBa")
    elif mode == "PA":
        image = Image.new("LA", (8, 8), (128, 255)).convert("PA")
    elif mode == "P":
        image = grey.convert("RGB").quantize(4)
    else:
        image = grey.convert("RGB").convert(mode)
    assert image.mode == mode
    result = to_rgb(image)
    assert result.mode == "RGB"
    expected = 255 if mode == "1" else 128
    assert np.abs(np.asarray(result).astype(int) - expected).max() <= (255 if mode == "1" else 2)


def test_transparency_is_composited_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.gif", transparency=0)
    grey = Image.new("L", (4, 4), 0)
    grey.save(tmp_path / "key.png", transparency=0)
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert abs(read_image(tmp_path / "half.png").getpixel((0, 0))[0] - 127) <= 1
    assert read_image(tmp_path / "palette.gif").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = RED
    Image.fromarray(stripes).save(tmp_path / "stripes.png", transparency=(0, 0, 0))
    reduced = read_image(tmp_path / "stripes.png", 16)              # would mix the key with its neighbours
    assert {color for _, color in reduced.getcolors()} == {RED, (255, 255, 255)}


def test_a_photo_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6                                            # the camera was turned: left is up
    image.save(tmp_path / "photo.jpg", exif=exif)
    upright = read_image(tmp_path / "photo.jpg")
    assert upright.size == (10, 20) and upright.getpixel((5, 2))[0] < 60 and upright.getpixel((5, 17))[0] > 200


def test_folder_classes_holdout_and_crops(tmp_path, capsys):
    make_folder(tmp_path, {"b": 60, "a/deep/er": 60, ".hidden": 3})
    (tmp_path / "b" / ".DS_Store").write_text("not an image")
    train, val = open_data(str(tmp_path), 16)
    assert not capsys.readouterr().err                          # hidden files are not even looked at
    assert train.classes == ["a", "b"] and len(train) + len(val) == 120 and 4 <= len(val) <= 8
    assert not set(paths(train)) & set(paths(val))
    assert [train.classes[i] for i in train.labels] == [Path(p).relative_to(tmp_path).parts[0] for p in paths(train)]
    again = open_data(str(tmp_path), 16)[1]
    assert paths(again) == paths(val)
    assert train.files.dtype.kind == "S"                        # bytes in one array: readers share it, not so a list
    images, labels = train.batch(np.array([0, len(train) - 1]), np.array([5, 6]))
    assert images.shape == (2, 3, 16, 16) and labels.tolist() == [0, 1]
    assert (images.float().mean((0, 2, 3)).round() == torch.tensor(RED)).all()


def test_augmentation_is_a_function_of_its_draw(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "a" / f"{i}.png")
    train, _ = open_data(str(tmp_path), 32)
    one, same, other = (train.batch(np.array([0]), np.array([draw]))[0] for draw in (1, 1, 2))
    plain = train.batch(np.array([0]))[0]
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, plain)


def test_training_images_are_flipped_and_validation_images_are_not(tmp_path):
    """Dark on the left, bright on the right: flipped images are the others."""
    ramp = np.arange(0, 240, 4, dtype=np.uint8)[None, :, None].repeat(60, 0).repeat(3, 2)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / "a" / "0.png")
    for size in (32, 80):                                       # from memory, and from the file
        train, val = open_data(str(tmp_path), size)
        images, _ = train.batch(np.zeros(100, int), np.arange(100))
        columns = images.float().mean((1, 2))                   # (100, size)
        assert 30 < (columns[:, 0] > columns[:, -1]).sum() < 70
        for images in (train.batch(np.zeros(3, int))[0], val.batch(np.zeros(3, int))[0]):
            columns = images.float().mean((1, 2))
            assert (columns[:, 0] < 20).all() and (columns[:, -1] > 210).all()


def test_random_crops_have_the_papers_sizes():
    """80 to 100% of the area, aspect 3/4 to 4/3; a long image is cropped to 4/3, not squeezed."""
    side = 100 * 0.8 ** 0.5
    assert random_crop(100, 100, 0, 0.5, 0, 0) == pytest.approx((0, 0, side, side))
    assert random_crop(100, 100, 0, 0.5, 1, 1) == pytest.approx((100 - side, 100 - side, 100, 100))
    assert random_crop(100, 100, 0, 0.5, 0.5, 0) == pytest.approx((50 - side / 2, 0, 50 + side / 2, side))
    assert random_crop(100, 100, 1, 0.5, 0.3, 0.8) == pytest.approx((0, 0, 100, 100))
    assert random_crop(100, 90, 0, 0, 0, 0)[2:] == pytest.approx(((7200 * 0.75) ** 0.5, 90))
    assert random_crop(90, 100, 0, 1, 0, 0)[2:] == pytest.approx((90, (7200 * 0.75) ** 0.5))
    assert random_crop(400, 90, 0, 1, 1, 0) == pytest.approx((280, 0, 400, 90))
    assert random_crop(90, 400, 0, 0, 0, 0.5) == pytest.approx((0, 140, 90, 260))


def test_validation_sees_the_square_in_the_centre(tmp_path):
    image = Image.new("RGB", (60, 30), "red")
    image.paste("green", (15, 0, 45, 30))
    for name, picture_of in (("wide", image), ("tall", image.rotate(90, expand=True))):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            picture_of.save(tmp_path / split / name / "0.png")
    for images in (part.batch(np.arange(2))[0] for part in open_data(str(tmp_path), 30)):
        assert torch.equal(images, torch.tensor([0, 128, 0], dtype=torch.uint8)[:, None, None].expand(2, 3, 30, 30))


def test_what_is_kept_or_decoded_is_never_smaller_than_needed(tmp_path):
    make_folder(tmp_path, {"a": 2}, size=(400, 300))
    train, _ = open_data(str(tmp_path), 32)
    assert [pixels.shape for pixels in train.pixels.values()] == [(64, 85, 3)] * 2
    Image.new("RGB", (400, 300), RED).save(tmp_path / "photo.jpg")
    assert read_image(tmp_path / "photo.jpg", 100).size == (200, 150)
    assert read_image(tmp_path / "photo.jpg").size == (400, 300)


def test_a_huge_picture_is_reduced_before_it_is_converted(tmp_path, monkeypatch):
    """Pictures of over HUGE pixels are decoded one at a time; what is done to smaller ones is done to them."""
    image = Image.new("RGBA", (900, 600), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 450, 600))
    exif = image.getexif()
    exif[0x0112] = 6                                            # the camera was turned: left is up
    image.save(tmp_path / "large.png", exif=exif)
    plain = read_image(tmp_path / "large.png", 32)
    monkeypatch.setattr(image_files, "HUGE", 1000)
    upright = read_image(tmp_path / "large.png", 32)
    assert np.array_equal(upright, plain) and upright.height > upright.width >= 32
    assert upright.getpixel((5, 2)) == (200, 0, 0) and upright.getpixel((5, upright.height - 3)) == (255, 255, 255)
    assert not image_files.ONE_HUGE_IMAGE_AT_A_TIME.locked()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_may_be_a_trap_is_admitted_by_its_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)        # is put back after the test
    picture(tmp_path / "a" / "0.png", (100, 100))
    image_files.admit_pixels(9999)
    with pytest.raises(UserError, match="too large.*--max-pixels"):
        read_image(tmp_path / "a" / "0.png")
    image_files.admit_pixels(10_000)
    assert read_image(tmp_path / "a" / "0.png").size == (100, 100)
    train, _ = open_data(str(tmp_path), 80)
    image_files.admit_pixels(9999)
    with pytest.raises(UserError, match="1 of 1 images"):           # though it was readable before
        open_data(str(tmp_path), 80)
    pickle.loads(pickle.dumps(train)).batch([0])                    # as a reader process gets it


def test_a_lack_of_memory_is_no_broken_file(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")
    def full(image, background):
        raise MemoryError
    monkeypatch.setattr(image_files, "to_rgb", full)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "0.png")


@pytest.mark.parametrize("size", [(5, 400), (400, 5), (1, 1), (33, 32)])
def test_odd_sizes(size, tmp_path):
    make_folder(tmp_path, {"a": 3}, size=size)
    for seeds in (None, np.array([3])):
        images, _ = open_data(str(tmp_path), 32)[0].batch(np.array([0]), seeds)
        assert images.shape == (1, 3, 32, 32) and (images.float().mean((0, 2, 3)).round() == torch.tensor(RED)).all()


@pytest.mark.slow
def test_imagenet_is_a_folder_with_the_papers_settings(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            for i in range(count):
                picture(tmp_path / "data" / "imagenet" / split / name / f"{i}.JPEG")
    output = run("train_vq.py", "--data", "imagenet", "--image-size", 32, *TINY_VQ, "--filters", 32, "--steps", 2,
                 cwd=tmp_path)
    assert "runs/imagenet" in output and "4 tokens of 32" in output


def test_imagenets_thousand_folders_have_names(tmp_path):
    for split in ("train", "val"):
        touch(*(tmp_path / "imagenet" / split / synset / "0.JPEG" for synset in SYNSETS))
    train, val = open_data("imagenet", 32, tmp_path)
    assert len(train) == 1000 and train.classes == val.classes
    assert train.classes[0] == "tench" and train.classes[90] == "lorikeet" and len(set(train.classes)) == 1000


FOUR = ["n01440764", "n01530575", "n02979186", "n03888257"]      # tench, brambling, cassette player, parachute
SCENES = ["airfield", "alley", "apartment_building/outdoor", "zen_garden"]


def photos(root, names, part, flat=False):
    """Writes ten JPEGs of four classes, each class of a shade, in its folder or all in one. Returns their classes."""
    in_order = []
    for i in range(10):
        label = i * 3 % 4
        folder = root if flat else root / names[label]
        picture(folder / f"{part}_{i:08}.JPEG", (12, 12), color=(60 * label,) * 3)
        in_order.append(names[label])
    return in_order


def layout(root, kind):
    """Writes 30 photos for training and ten for validation in one of the ways in which they come, and their labels."""
    names = FOUR
    train = root / "train"
    val = root / "val"
    if kind == "kaggle":
        train = root / "ILSVRC" / "Data" / "CLS-LOC" / "train"
        val = train.with_name("val")
    elif kind == "places easy":
        names = [scene.replace("/", "-") for scene in SCENES]
        train = root / "places365_standard" / "train"
        val = train.with_name("val")
    elif kind == "places":
        names = [f"{scene[0]}/{scene}" for scene in SCENES]
        train = root / "data_256"
        val = root / "val_256"
    for part in "abc":
        photos(train, names, part)
    in_order = photos(val, names, "val", flat=kind in ("list", "kaggle", "places"))
    if kind == "list":
        (root / "synsets.txt").write_text("\n".join(in_order) + "\n\n")
    elif kind == "kaggle":
        rows = [f"val_{i:08},{name} 1 2 3 4 {name} 5 6 7 8" for i, name in enumerate(in_order)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
    elif kind == "places":
        rows = [f"val_{i:08}.JPEG {names.index(name) + 7}" for i, name in enumerate(in_order)]
        (root / "places365_val.txt").write_text("\n".join(rows))
        (root / "categories_places365.txt").write_text("\n".join(f"/{name} {i + 7}" for i, name in enumerate(names)) + "\n\n")


@pytest.mark.parametrize("name, kind, inside", [
    ("imagenet", "folders", "imagenet"), ("imagenet", "list", "imagenet"), ("imagenet", "kaggle", ""),
    ("places2", "places easy", "places2"), ("places2", "places", ""), ("places2", "places", "places2")])
def test_imagenet_and_places2_open_as_they_come(name, kind, inside, tmp_path):
    layout(tmp_path / inside, kind)
    train, val = open_data(name, 8, tmp_path)
    assert (len(train), len(val)) == (30, 10)
    if name == "imagenet":
        assert train.classes == ["tench", "brambling", "cassette player", "parachute"]
    else:
        assert train.classes == ["airfield", "alley", "apartment_building-outdoor", "zen_garden"]
    for part in (train, val):
        images, labels = part.batch(np.arange(len(part)))
        assert ((images[:, 0, 4, 4] / 60).round() == labels).all() and len(set(labels.tolist())) == 4


def test_a_part_of_imagenet_has_names_too(tmp_path):
    layout(tmp_path / "imagenette", "list")
    train, val = open_data(str(tmp_path / "imagenette"), 8)
    assert find_class("tench", train.classes) == 0 and train.classes == val.classes
    assert ((val.batch(np.arange(10))[0][:, 0, 4, 4] / 60).round() == torch.from_numpy(val.labels)).all()


@pytest.mark.parametrize("labels", [None, "n01440764\n" * 9, "1\n" * 10])
def test_a_flat_val_without_its_labels_says_which_file_is_missing(labels, tmp_path):
    layout(tmp_path / "imagenet", "list")
    (tmp_path / "imagenet" / "synsets.txt").unlink()
    if labels:
        (tmp_path / "imagenet" / "other.txt").write_text(labels)
    with pytest.raises(UserError, match=r"val holds 10 images in no class folder.*LOC_val_solution.csv.*of 10 lines"):
        open_data("imagenet", 8, tmp_path)


def test_classes_of_a_flat_folder_may_have_spaces(tmp_path):
    (tmp_path / "labels.txt").write_text("golden retriever\ntench\ngolden retriever\n")
    assert label_flat(str(tmp_path), ["a", "b", "c"], ["tench", "golden retriever"]) == {
        "tench": ["b"], "golden retriever": ["a", "c"]}


@pytest.mark.parametrize("archives, says", [
    (["imagenet/ILSVRC2012_img_val.tar", "imagenet/ILSVRC2012_img_train.tar"],
     "mkdir -p DIR/imagenet/train && tar -xf DIR/imagenet/ILSVRC2012_img_train.tar -C DIR/imagenet/train; or name .* --data-dir$"),
    (["imagenet/ILSVRC2012_img_train.tar", "imagenet/ILSVRC2012_img_val.tar", "imagenet/train/n01440764/0.JPEG"],
     "tar -xf DIR/imagenet/ILSVRC2012_img_val.tar -C DIR/imagenet/val; or"),
    (["imagenet/train/n01440764.tar", "imagenet/val/n01440764/0.JPEG"], "n01440764.tar.* for f in n\\*.tar; do mkdir"),
    (["imagenet-object-localization-challenge.zip"], "unzip -q DIR/imagenet-object-.*zip -d DIR; or"),
    (["cifar-10-binary.tar.gz"], "imagenet should hold train/CLASS")])
def test_archives_are_told_how_to_be_unpacked(archives, says, tmp_path):
    touch(*(tmp_path / name for name in archives))
    with pytest.raises(UserError, match=says.replace("DIR", str(tmp_path))):
        open_data("imagenet", 8, tmp_path)


@pytest.mark.parametrize("name, says", [
    ("photos.zip", "unzip -q photos.zip -d photos; then --data photos"),
    ("a b.tar.gz", "mkdir -p 'a b' && tar -xf 'a b.tar.gz' -C 'a b'; then --data 'a b'"),
    ("photos.tgz", "tar -xf photos.tgz -C photos; then --data photos")])
def test_an_archive_as_data_is_told_how_to_be_unpacked(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(Path(name))
    with pytest.raises(UserError, match=f"{name} is an archive: .*{says}$"):
        open_data(name)


def test_large_images_are_read_from_their_files(tmp_path):
    make_folder(tmp_path, {"a": 3}, size=(300, 200))
    train, _ = open_data(str(tmp_path), 128)
    assert not train.pixels and train.batch(np.array([1]), np.array([1]))[0].shape == (1, 3, 128, 128)
    stream = training_batches(train, 2, 0, 0, 3, workers=1)
    assert torch.equal(next(stream)[0], next(training_batches(train, 2, 0, 0, 3, workers=0))[0])


# ---- which files, which classes

def unchecked(root):
    return folders.open_folder(root, 32, check=False)


def test_classes_sort_as_people_count(tmp_path):
    make_folder(tmp_path, {str(i): 2 for i in range(1, 13)})
    train, _ = open_data(str(tmp_path), 16)
    assert train.classes == [str(i) for i in range(1, 13)]
    assert [train.classes[label] for label in train.labels] == [Path(path).parent.name for path in paths(train)]
    assert sorted(["b10", "b2", "a", "b2x", "B", "2", "10"], key=scan.natural_order) == [
        "2", "10", "B", "a", "b2", "b2x", "b10"]


def test_other_files_than_images_are_passed_over(tmp_path, capsys):
    make_folder(tmp_path, {"a": 30, "b": 30})
    touch(tmp_path / "a" / "Thumbs.db", tmp_path / "b" / "notes.txt", tmp_path / "words" / "c.txt", tmp_path / "README")
    picture(tmp_path / "a" / "LOUD.JPG")
    train, val = open_data(str(tmp_path), 16)
    assert train.classes == ["a", "b"] and len(train) + len(val) == 61
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "passed over 4 files" in said[0] and "'words'" in said[1] and "no readable image" in said[1]


def test_a_class_without_a_readable_image_is_left_out(tmp_path, capsys):
    make_folder(tmp_path, {"train/a": 150, "train/b": 1, "train/c": 1, "val/a": 2, "val/b": 2, "val/c": 2})
    (tmp_path / "train" / "b" / "000.png").write_text("no image")
    for size in (16, 80):
        train, val = open_data(str(tmp_path), size)
        assert train.classes == val.classes == ["a", "c"] and (len(train), len(val)) == (151, 4)
        assert "class 'b'" in capsys.readouterr().err
        assert val.labels.tolist() == [0, 0, 1, 1]


def test_linked_class_folders_are_followed_but_not_in_circles(tmp_path):
    make_folder(tmp_path / "elsewhere", {"b": 3})
    make_folder(tmp_path / "images", {"a": 3})
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "images" / "a" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "a" / "self").symlink_to(tmp_path / "images" / "a")
    for loop in (tmp_path / "images" / "loop", tmp_path / "images" / "a" / "loop"):
        loop.symlink_to(loop)
    train, val = unchecked(tmp_path / "images")
    assert train.classes == ["a", "b"] and len(train) + len(val) == 6


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 3, "b": 3})
    def scandir(path, real=os.scandir):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="/b cannot be read .Permission denied.: change its permissions"):
        unchecked(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test"])
def test_a_split_folder_has_its_own_validation_images(name, tmp_path):
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_folder(tmp_path / name, {"a": 2, "b": 2})
    touch(tmp_path / "labels.csv")
    train, val = open_data(str(tmp_path), 32)
    assert (len(train), len(val), val.classes) == (8, 4, ["a", "b"])
    assert all(f"/{name}/" in path for path in paths(val))


def test_validation_folders_have_an_order_and_are_never_classes(tmp_path):
    touch(*(tmp_path / split / "a" / "0.png" for split in ("test", "validation", "valid")))
    with pytest.raises(UserError, match="valid/ and validation/, but no train/"):
        unchecked(tmp_path)
    touch(tmp_path / "train" / "a" / "0.png")
    for name in ("valid", "validation", "test"):
        assert f"/{name}/" in unchecked(tmp_path)[1].path(0)
        shutil.rmtree(tmp_path / name)
    touch(*(tmp_path / "train" / "a" / f"{i}.png" for i in range(40)), tmp_path / ".git" / "config",
          tmp_path / "annotations" / "a.xml")
    train, val = unchecked(tmp_path)                            # train/ alone: its folders are the classes
    assert train.classes == ["a"] and (len(train), len(val)) == (38, 2)
    touch(tmp_path / "car" / "0.png")                           # among others, `train` may well be one
    assert unchecked(tmp_path)[0].classes == ["car", "train"]


def test_classes_one_folder_too_deep_are_noted(tmp_path, capsys):
    make_folder(tmp_path / "flowers", {"flowers/rose": 2, "flowers/tulip": 2})
    touch(tmp_path / "flowers" / "annotations" / "a.xml")
    unchecked(tmp_path / "flowers")
    assert f"if the subfolders of {tmp_path}/flowers/flowers are classes, name that" in capsys.readouterr().err
    unchecked(tmp_path / "flowers" / "flowers")
    assert not capsys.readouterr().err


def test_five_percent_of_each_class_are_held_out(tmp_path):
    """By hashes of names and paths: the same ones on every machine, and in every version."""
    counts = {"hundred": 100, "ten": 10, "one": 1, "two": 2}
    touch(*(tmp_path / name / f"{i:03}.png" for name, count in counts.items() for i in range(count)))
    train, val = unchecked(tmp_path)
    assert not set(paths(train)) & set(paths(val)) and len(train) + len(val) == 113
    assert [str(Path(path).relative_to(tmp_path)) for path in paths(val)] == [
        "hundred/001.png", "hundred/011.png", "hundred/020.png", "hundred/047.png", "hundred/048.png", "ten/003.png"]
    assert set(train.labels) == set(range(4))


def test_every_class_keeps_an_image_for_training(tmp_path):
    touch(*(tmp_path / "ones" / f"class{i}" / "0.png" for i in range(100)))
    train, val = unchecked(tmp_path / "ones")
    assert len(train) == 100 and len(val) == 1 and set(train.labels) == set(range(100))
    touch(*(tmp_path / "twos" / f"class{i}" / f"{j}.png" for i in range(100) for j in range(10)))
    train, val = unchecked(tmp_path / "twos")
    assert len(train) + len(val) == 1000 and 30 < len(val) < 70
    assert np.bincount(val.labels).max() == 1                   # spread over the classes
    touch(*(tmp_path / "few" / "a" / f"{i}.png" for i in range(2)))
    assert [len(part) for part in unchecked(tmp_path / "few")] == [1, 1]


def test_names_that_are_not_utf8(tmp_path, capsys):
    root = os.fsencode(tmp_path)
    for name in (b"a", b"caf\xe9"):
        os.mkdir(os.path.join(root, name))
        for i in range(30):
            picture(Path(os.fsdecode(os.path.join(root, name, b"\xff%d.png" % i))))
    Path(os.fsdecode(os.path.join(root, b"a", b"\xfebad.txt"))).touch()
    for size in (16, 80):
        train, val = open_data(str(tmp_path), size)
        assert train.classes == ["a", "caf\\xe9"] and len(train) + len(val) == 60
        json.dumps(train.classes).encode() + "".join(train.classes).encode()       # can be printed and written
        assert len(set(train.signatures())) == len(train)
        train.batch([0])


def test_bad_folders(tmp_path):
    make_folder(tmp_path / "third", {"a": 20})
    for i in range(10):
        (tmp_path / "third" / "a" / f"bad{i}.png").write_text("no image")
    for size in (32, 80):
        with pytest.raises(UserError, match="10 of 30 images in .*third are not readable, over 1%.*bad0.png"):
            open_data(str(tmp_path / "third"), size)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="empty holds no images.*subfolder"):
        open_data(str(tmp_path / "empty"))
    make_folder(tmp_path / "uneven" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "uneven" / "val", {"a": 2})
    with pytest.raises(UserError, match="class 'b' is in only one of .*train and .*val"):
        open_data(str(tmp_path / "uneven"))
    with pytest.raises(UserError, match="'imagnet' is no data set and no folder: --data takes shapes, cifar10"):
        open_data("imagnet")


def test_a_data_path_is_kept_absolute(tmp_path, monkeypatch):
    make_folder(tmp_path / "real", {"a": 3})
    monkeypatch.chdir(tmp_path)
    assert {resolve_data(name) for name in ("real", "real/", "./real", str(tmp_path / "real"), "real/a/..")} == {
        str(tmp_path / "real")}
    assert [resolve_data(name) for name in data.DATA_SETS] == list(data.DATA_SETS)
    files = paths(open_data(resolve_data("real"), 16)[0])
    assert files == paths(open_data("real/", 16)[0])
    monkeypatch.chdir(tmp_path / "real")
    assert paths(open_data(resolve_data("."), 16)[0]) == files


def test_a_run_inside_its_data_is_refused(tmp_path, monkeypatch):
    make_folder(tmp_path / "real", {"a": 3})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for run_, data_ in (("runs/real", "."), (tmp_path / "real", tmp_path / "real"), ("runs", tmp_path / "link"),
                         (tmp_path / "link" / "runs", tmp_path / "real")):
        with pytest.raises(UserError, match="lies inside its data.*--run"):
            check_run_outside_data(run_, str(data_))
    check_run_outside_data("../runs/real", ".")
    check_run_outside_data(tmp_path / "real2", str(tmp_path / "real"))
    check_run_outside_data("runs/shapes", "shapes")


def test_a_set_of_over_a_third_of_the_memory_is_read_from_the_disk(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, {"a": 30, "b": 30})
    for memory, kept in ((3.1 * 60 * 16384, True), (2.9 * 60 * 16384, False)):                 # 64 x 85 x 3 bytes each
        monkeypatch.setattr(folders, "memory", lambda memory=memory: memory)
        train, _ = open_data(str(tmp_path), 32)
        assert bool(train.pixels) == (train.workers == 0) == kept
        assert ("read from the disk" in capsys.readouterr().err) != kept
        assert train.batch(np.arange(2), np.arange(2))[0].shape == (2, 3, 32, 32)
    monkeypatch.setattr(folders, "memory", lambda: 20 * 60 * 16384)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")                 # each of eight processes would keep its copy
    assert not open_data(str(tmp_path), 32)[0].pixels


# ---- broken files

def test_files_are_decoded_once(tmp_path, monkeypatch, capsys):
    """Those that were readable are not decoded again while they are as they were."""
    root, decoded = tmp_path / "images", []
    make_folder(root, {"train/a": 120, "val/a": 2})
    bad = root / "train" / "a" / "bad.png"
    bad.write_text("no image")

    def read_and_note(path, size):
        decoded.append(Path(path).name)
        return read_image(path, size)

    def lengths(name):
        decoded.clear()
        return [len(part) for part in open_data(name, 80)]
    monkeypatch.setattr(scan, "read_image", read_and_note)
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert lengths(str(root)) == [120, 2] and len(decoded) == 123
    assert "left out: " in capsys.readouterr().err
    assert lengths("images") == [120, 2] and decoded == ["bad.png"]         # from any working folder
    assert "bad.png" in capsys.readouterr().err                             # that it is left out is said each time
    picture(root / "train" / "a" / "new.png")
    assert lengths(str(root)) == [121, 2] and decoded == ["bad.png", "new.png"]
    picture(bad)                                                            # repaired
    assert lengths(str(root)) == [122, 2] and decoded == ["bad.png"]
    assert not capsys.readouterr().err.count("left out: ") > 1
    (root / "train" / "a" / "000.png").write_text("now broken")
    assert lengths(str(root)) == [121, 2] and decoded == ["000.png"]
    assert "000.png" in capsys.readouterr().err
    for kept in (tmp_path / "cache").iterdir():
        kept.write_text("{")                                                # damaged
    assert lengths(str(root)) == [121, 2] and len(decoded) == 124
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "occupied"))
    assert lengths(str(root)) == [121, 2] and len(decoded) == 124
    assert "could not be kept" in capsys.readouterr().err


def test_one_scan_serves_both_parts_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "images", {"a": 130})
    (root / "a" / "044.png").write_text("no image")             # one of few if it is held out, but under 1% of all
    assert sum(map(len, open_data(str(root), 80))) == 129


def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    make_folder(tmp_path, {"a": 120, "b": 130})
    whole = (tmp_path / "a" / "000.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(whole[:-25])
    (tmp_path / "b" / "notes.png").write_text("no image")
    train, val = open_data(str(tmp_path), 32)
    said = capsys.readouterr().err
    assert "cut.png" in said and "notes.png" in said and "left out 2 of 252" in said
    assert len(train) + len(val) == 250


def coloured(root, count):
    """Pictures each of a grey of its own, in PNG, which keeps it."""
    for i in range(count):
        path = root / "train" / f"{i % 2}" / f"{i:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (i, i, i)).save(path, format="png")
    make_folder(root, {"val/0": 1, "val/1": 1})
    return root


@pytest.mark.filterwarnings("ignore:This DataLoader will create")         # more readers than there are cores
def test_a_file_that_nobody_checked_is_replaced_by_its_neighbour(tmp_path, capfd):
    """Whatever the number of readers: the batches are the same, and it is named once in two epochs."""
    root = coloured(tmp_path / "imagenet", 200)
    broken = root / "train" / "0" / "100.JPEG"                  # its neighbour is 102
    broken.write_text("no image")
    streams = []
    for workers in (0, 1, 2, 4):
        train, _ = open_data("imagenet", 8, tmp_path)
        streams.append(list(training_batches(train, 8, 0, 0, 50, workers)))
        said = capfd.readouterr().err
        assert said.count("passed over") == 1 and "100.JPEG" in said
    shades = torch.cat([images[:, 0, 4, 4] for images, _ in streams[0]]).tolist()
    assert len(shades) == 400 and {shades.count(i) for i in range(200)} - {2} == {0, 4}
    assert shades.count(100) == 0 and shades.count(102) == 4
    for stream in streams[1:]:
        for one, other in zip(stream, streams[0], strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def start(main):
    """Forks a process (a new one takes seconds) that calls main() as a script does, with a group of its own."""
    def in_its_group():
        os.setsid()
        command_line(main)
    process = multiprocessing.get_context("fork").Process(target=in_its_group)
    process.start()
    return process


def readers_of(process):
    """The processes of a script's group beside itself."""
    listed = subprocess.run(["ps", "-o", "pid=", "-g", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split() if int(pid) != process.pid]


def assert_ends(process, within, code):
    process.join(within)
    assert process.exitcode == code
    assert not readers_of(process)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_too_many_broken_files_end_the_run(workers, tmp_path, capfd):
    for path in coloured(tmp_path / "imagenet", 50).glob("train/*/*.JPEG"):
        path.write_text("no image")

    def main():
        train, _ = open_data("imagenet", 32, tmp_path)
        for _ in training_batches(train, 4, 0, 0, 1000, workers):
            print("a batch")
    assert_ends(start(main), 15, code=2)
    said = capfd.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("error: ") and ".JPEG is not a readable image" in last and "over 1%" in last
    assert "Traceback" not in said.err and not said.out


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_beside_readers_is_one_line(workers, tmp_path, capfd):
    coloured(tmp_path / "imagenet", 50)

    def main():
        stream = training_batches(open_data("imagenet", 32, tmp_path)[0], 4, 0, 0, 10**6, workers)
        next(stream)
        raise UserError("the disk is full: free some space")
    assert_ends(start(main), 15, code=2)
    assert capfd.readouterr().err.splitlines()[-1] == "error: the disk is full: free some space"


def test_a_reader_that_dies_is_an_error_of_one_line(tmp_path, capfd):
    coloured(tmp_path / "imagenet", 50)

    def main():
        stream = training_batches(open_data("imagenet", 32, tmp_path)[0], 4, 0, 0, 10**6, 1)
        next(stream)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)                                     # as in a training step
        for _ in stream:
            pass
    assert_ends(start(main), 15, code=2)
    said = capfd.readouterr().err
    assert "a process that reads images died" in said and "--ipc=host" in said and "Traceback" not in said


def read_for_ever(folder, batch_came, ignored):
    """Reads with two workers; signals do not end it, as in training."""
    for number in ignored:
        signal.signal(number, lambda number, frame: None)
    for _ in training_batches(open_data("imagenet", 32, folder)[0], 4, 0, 0, 10**9, 2):
        batch_came.set()


def wait_for_another(batch_came):
    batch_came.clear()
    assert batch_came.wait(20)


def test_readers_survive_signals(tmp_path):
    """torchrun sends SIGTERM to the whole group: the last step before saving still needs its readers."""
    coloured(tmp_path / "imagenet", 50)
    batch_came = multiprocessing.Event()
    process = start(lambda: read_for_ever(tmp_path, batch_came, [signal.SIGINT, signal.SIGTERM]))
    for _ in range(2):                                      # each reader has brought one, and so is ready
        wait_for_another(batch_came)
    readers = readers_of(process)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    for _ in range(20):                                     # more than were read ahead
        wait_for_another(batch_came)
    assert readers_of(process) == readers and len(readers) == 2
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
def test_readers_do_not_outlive_a_process_that_is_killed(tmp_path):
    coloured(tmp_path / "imagenet", 50)
    batch_came = multiprocessing.Event()
    process = start(lambda: read_for_ever(tmp_path, batch_came, []))
    wait_for_another(batch_came)
    process.kill()
    process.join()
    for _ in range(300):                        # each looks every five seconds whether its parent lives
        if not readers_of(process):
            break
        time.sleep(0.1)
    assert not readers_of(process)


@pytest.mark.slow
def test_readers_do_not_delay_the_end_of_a_process(tmp_path):
    """Where SystemExit passes by command_line(), after a signal: a whole interpreter, since forks have no atexit."""
    coloured(tmp_path / "imagenet", 50)
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lib.data import open_data
from lib.errors import command_line
from lib.loader import training_batches

def main():
    for _ in training_batches(open_data("imagenet", 32, {str(tmp_path)!r})[0], 4, 0, 0, 10**9, 2):
        sys.exit(143)

command_line(main)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 143 and not result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_reading_is_stopped_by_a_signal(number, tmp_path, monkeypatch, capfd):
    """Also where a training run has taken the signals for itself; 1,000 pictures would take a minute."""
    make_folder(tmp_path / "images", {"a": 1000})
    reading = multiprocessing.Event()

    def read_slowly(path, size):
        reading.set()
        time.sleep(0.1)
        return read_image(path, size)

    def main():
        for taken in (signal.SIGINT, signal.SIGTERM):
            signal.signal(taken, lambda number, frame: None)
        open_data(str(tmp_path / "images"), 32)
    monkeypatch.setattr(scan, "read_image", read_slowly)
    process = start(main)
    assert reading.wait(30)
    time.sleep(0.3)                                         # until all pictures are in the queue of the threads
    os.kill(process.pid, number)
    assert_ends(process, 10, code=130)
    assert f"stopped while reading {tmp_path}/images" in capfd.readouterr().err


# ---- classes

def test_classes_are_found_by_name_and_by_number():
    classes = ["Fish", "catfish", "dog", "cat"]
    assert [find_class(text, classes) for text in ("3", "fish", "CATF", "do", "cat", "Cat")] == [3, 0, 1, 2, 3, 3]
    for text, message in (("4", "class 4 does not exist.*0 to 3"), ("i", "'i' fits several: Fish, catfish$"),
                          ("bird", "class 'bird' does not exist: this run has Fish, catfish, dog, cat$")):
        with pytest.raises(UserError, match=message):
            find_class(text, classes)
    with pytest.raises(UserError, match=r"'x' does not exist: this run has 0y, .*11y, \.\.\.$"):
        find_class("x", [f"{i}y" for i in range(13)])


def test_a_class_whose_name_is_a_number_is_found_by_it():
    classes = [str(i) for i in range(1, 13)]
    assert [classes[find_class(text, classes)] for text in ("1", "10", "12", "2")] == ["1", "10", "12", "2"]
    with pytest.raises(UserError, match="class '0' does not exist: this run has 1, 2, 3"):
        find_class("0", classes)
    assert find_class("3", ["7up", "a3", "b", "c"]) == 3        # a name with a number in it is no number
    assert find_class("Cat", ["cat", "Cat"]) == 1


# ---- the terminal

def test_names_that_are_not_utf8_are_printed(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    command_line(lambda: print("caf\udce9", flush=True))
    assert stdout.buffer.getvalue() == b"caf\\udce9\n"


def test_a_terminal_without_a_width(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(stream, "fileno", lambda: 1)
    monkeypatch.setattr(os, "get_terminal_size", lambda fileno: os.terminal_size((0, 0)))
    terminal.show_line("half done", stream=stream)
    assert stream.getvalue() == "\r" + "half done".ljust(79)


# ---- files that are written

def test_a_lack_of_memory_is_no_damaged_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        load_tensors(tmp_path / "file")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="cannot write .*File name too long; free some space"):
        write_atomically(tmp_path / ("x" * 300), lambda file: None)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    with open(path, "rb") as reader:
        write_atomically(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old"                          # who has opened it goes on reading what it was
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error, raised", [
    (OSError(errno.ENOSPC, "No space left on device"), UserError), (RuntimeError("a bug"), RuntimeError),
    (KeyboardInterrupt(), KeyboardInterrupt), (ZeroDivisionError(), ZeroDivisionError)])
def test_a_write_that_fails_changes_nothing(error, raised, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"ne")
        assert path.read_bytes() == b"old"
        raise error
    with pytest.raises(raised) as caught:
        write_atomically(path, write)
    if raised is UserError:
        assert str(path) in str(caught.value) and "free some space" in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
