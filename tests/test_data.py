"""The data sets: drawn, from an archive, and from folders as untidy as real ones; files that are whole or not there."""
import colorsys
import errno
import hashlib
import io
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VQ, refused, run
from PIL import Image

from lib import data, shapes
from lib.data import Cifar10, Steps, batches, find_class, open_data, random_crop, read_image
from lib.files import write_atomically
from lib.shapes import Shapes, draw_scenes, hsv_to_rgb
from lib.tokens import CachedTokens

RED = (220, 20, 30)


def picture(path, size=(40, 30), mode="RGB", color=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


def make_folder(root, counts, **options):
    for name, count in counts.items():
        for i in range(count):
            picture(root / name / f"{i:03}.png", **options)
    return root


# ---- shapes

def test_shapes_are_a_pure_function_of_split_and_index():
    train, val = Shapes("train"), Shapes("val")
    assert (len(train), len(val)) == (50_000, 5_000)
    images, labels = train.batch(range(100, 140))
    alone, label = train.batch([117])
    assert torch.equal(alone[0], images[17]) and label == labels[17] == 7
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert not torch.equal(val.batch([117])[0], alone)
    code = ("import hashlib; from lib.shapes import Shapes; "
            "print(hashlib.md5(Shapes('val').batch(range(20))[0].contiguous().numpy().tobytes()).hexdigest())")
    here = hashlib.md5(val.batch(range(20))[0].contiguous().numpy().tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert there.stdout.strip() == here


def test_shapes_vary_and_are_shaded():
    images, labels = Shapes("train").batch(range(2000))
    assert torch.bincount(labels).tolist() == [200] * 10
    assert len(torch.unique(images.flatten(1), dim=0)) == 2000
    # Anti-aliased and graded: far more colours in an image than two flat ones.
    assert min(len(torch.unique(image.flatten(1).T, dim=0)) for image in images[:50]) > 150


def test_hashed_uniform_is_uniform():
    u = shapes.hashed_uniform(1, range(20_000), 4)
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
        def batch(self, indices, draws): return torch.tensor(indices), torch.tensor(draws)
    whole = list(batches(Indices(), 4, 7, 0, 10))
    order = torch.cat([indices for indices, _ in whole])
    for epoch in order.view(4, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert len(set(torch.cat([draws for _, draws in whole]).tolist())) == 40
    later = list(batches(Indices(), 4, 7, 6, 10))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[6:], later))
    other = list(batches(Indices(), 4, 8, 0, 10))
    assert not torch.equal(order, torch.cat([indices for indices, _ in other]))
    draws, others = (set(torch.cat([draws for _, draws in stream]).tolist()) for stream in (whole, other))
    assert not draws & others


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_divide_each_batch(world):
    """Side by side, what the ranks get is the batch of one process: images and draws, also over the end of an epoch."""
    class Indices:
        workers = 0
        def __len__(self): return 10
        def batch(self, indices, draws): return np.stack([indices, draws])
    whole, shares = Steps(Indices(), 6, 7), [Steps(Indices(), 6, 7, rank, world) for rank in range(world)]
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
    train, val = open_data("cifar10", folder=tmp_path)
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


def test_cifar_with_a_wrong_checksum(tmp_path):
    (tmp_path / "data").mkdir()
    cifar_archive(tmp_path / "data" / "cifar-10-binary.tar.gz")
    refused("train_vq.py", "--data", "cifar10", *TINY_VQ, cwd=tmp_path,
            says=["cifar-10-binary.tar.gz", "checksum", "delete it"])


# ---- folders

@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
                                  "LAB", "HSV", "I", "I;16", "I;16B", "F"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    grey = Image.new("L", (8, 8), 128)
    if mode in ("I", "I;16", "I;16B"):
        image = Image.fromarray(np.full((8, 8), 128 * 257, np.int32 if mode == "I" else np.uint16))
        image = image if mode != "I;16B" else image.convert("I").convert("I;16B")
    elif mode == "La":
        image = Image.new("LA", (8, 8), (128, 255)).convert("La")
    elif mode == "RGBa":
        image = Image.new("RGBA", (8, 8), (128, 128, 128, 255)).convert("RGBa")
    elif mode == "LAB":
        image = Image.new("LAB", (8, 8), (137, 128, 128))       # L* = 53.6 is the grey of 128
    elif mode == "PA":
        image = Image.new("LA", (8, 8), (128, 255)).convert("PA")
    elif mode == "P":
        image = grey.convert("RGB").quantize(4)
    else:
        image = grey.convert("RGB").convert(mode)
    assert image.mode == mode
    result = data.to_rgb(image)
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
    assert train.classes == ["a", "b"] and len(train) + len(val) == 120 and 1 <= len(val) <= 15
    assert not set(train.files) & set(val.files)
    assert [train.classes[i] for i in train.labels] == [p.relative_to(tmp_path).parts[0] for p in train.files]
    again = open_data(str(tmp_path), 16)[1]
    assert again.files == val.files
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
    assert [pixels.shape for pixels in train.pixels] == [(64, 85, 3)]
    Image.new("RGB", (400, 300), RED).save(tmp_path / "photo.jpg")
    assert read_image(tmp_path / "photo.jpg", 100).size == (200, 150)
    assert read_image(tmp_path / "photo.jpg").size == (400, 300)


def test_one_file_in_twenty_is_held_out(tmp_path):
    """By a hash of its path: the same ones on every machine, and in every version."""
    (tmp_path / "a").mkdir()
    for i in range(1000):
        (tmp_path / "a" / f"{i:03}.png").touch()
    train, val = (part.files for part in data.open_folder(tmp_path, 32, check=False))
    assert len(val) == 58 and [path.stem for path in val[:5]] == ["044", "046", "053", "070", "083"]
    assert len(train) == 1000 - len(val) and not set(train) & set(val)


def test_files_are_looked_at_once(tmp_path, monkeypatch, capsys):
    """Large images are decoded once, and again where a file was added; without a place to keep that, every time."""
    root, seen = tmp_path / "images", []
    make_folder(root, {"train/a": 120, "val/a": 2})
    (root / "train" / "a" / "bad.png").write_text("no image")

    def read_and_count(path, size):
        seen.append(path)
        return read_image(path, size)
    monkeypatch.setattr(data, "read_image", read_and_count)
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in (str(root), "images"):                          # from any working folder
        assert [len(part) for part in open_data(name, 80)] == [120, 2] and len(seen) == 123
        assert "bad.png" in capsys.readouterr().err             # that it is left out is said each time
    picture(root / "train" / "a" / "new.png")
    assert [len(part) for part in open_data(str(root), 80)] == [121, 2] and len(seen) == 123 + 122
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "occupied"))
    assert [len(part) for part in open_data(str(root), 80)] == [121, 2]
    assert "could not be kept" in capsys.readouterr().err


def test_one_scan_serves_both_parts_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "images", {"a": 130})
    (root / "a" / "044.png").write_text("no image")             # is held out: one of few there, but less than 1% of all
    assert sum(map(len, open_data(str(root), 80))) == 129
    monkeypatch.setattr(data, "read_image", None)               # the second start decodes none
    assert sum(map(len, open_data(str(root), 80))) == 129


def test_large_pictures_are_reduced_in_strips_one_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (1000, 700, 4), np.uint8))
    assert np.array_equal(data.reduce(image, 7), image.reduce(7))
    exif = image.getexif()
    exif[0x0112] = 6                                            # the camera was turned: left is up
    flat = Image.new("RGBA", (900, 600), (10, 20, 30, 0))
    flat.paste((200, 0, 0, 255), (0, 0, 450, 600))
    flat.save(tmp_path / "large.png", exif=exif)
    monkeypatch.setattr(data, "LARGE", 1000)
    monkeypatch.setattr(data, "ALONE", inside := threading.Lock())
    monkeypatch.setattr(data, "to_rgb", lambda image, real=data.to_rgb: real(image) if inside.locked() else None)
    upright = read_image(tmp_path / "large.png", 32)
    assert upright.height > upright.width >= 32 and not inside.locked()
    assert upright.getpixel((5, 2)) == (200, 0, 0) and upright.getpixel((5, upright.height - 3)) == (255, 255, 255)


def test_what_may_be_a_trap_is_admitted_by_its_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)        # is put back after the test
    picture(tmp_path / "a" / "0.png", (100, 100))
    data.admit_pixels(9999)
    with pytest.raises(ValueError, match="too large.*--max-pixels"):
        read_image(tmp_path / "a" / "0.png")
    data.admit_pixels(10_000)
    assert read_image(tmp_path / "a" / "0.png").size == (100, 100)


@pytest.mark.parametrize("size", [(5, 400), (400, 5), (1, 1), (33, 32)])
def test_odd_sizes(size, tmp_path):
    make_folder(tmp_path, {"a": 3}, size=size)
    for draws in (None, np.array([3])):
        images, _ = open_data(str(tmp_path), 32)[0].batch(np.array([0]), draws)
        assert images.shape == (1, 3, 32, 32) and (images.float().mean((0, 2, 3)).round() == torch.tensor(RED)).all()


def test_train_and_val_folders(tmp_path):
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_folder(tmp_path / "val", {"a": 2, "b": 2})
    train, val = open_data(str(tmp_path), 32)
    assert (len(train), len(val), val.classes) == (8, 4, ["a", "b"])


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
        for i in range(1000):
            picture(tmp_path / "imagenet" / split / f"n{i:08}" / "0.JPEG", size=(4, 4))
    train, val = open_data("imagenet", 32, tmp_path)
    assert len(train) == 1000 and train.classes == val.classes
    assert train.classes[0] == "tench" and train.classes[90] == "lorikeet" and len(set(train.classes)) == 1000


def test_large_images_are_read_from_their_files(tmp_path):
    make_folder(tmp_path, {"a": 3}, size=(300, 200))
    train, _ = open_data(str(tmp_path), 128)
    assert train.pixels is None and train.batch(np.array([1]), np.array([1]))[0].shape == (1, 3, 128, 128)
    stream = batches(train, 2, 0, 0, 3, workers=1)
    assert torch.equal(next(stream)[0], next(batches(train, 2, 0, 0, 3, workers=0))[0])


def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    make_folder(tmp_path, {"a": 120, "b": 130})
    whole = (tmp_path / "a" / "000.png").read_bytes()
    (tmp_path / "a" / "cut.png").write_bytes(whole[:-25])
    (tmp_path / "b" / "notes.txt").write_text("no image")
    train, val = open_data(str(tmp_path), 32)
    said = capsys.readouterr().err
    assert "cut.png" in said and "notes.txt" in said and "left out" in said
    assert len(train) + len(val) == 250


def test_bad_folders(tmp_path):
    make_folder(tmp_path / "third", {"a": 20})
    for i in range(10):
        (tmp_path / "third" / "a" / f"bad{i}.png").write_text("no image")
    flags = ["--run", tmp_path / "run", *TINY_VQ]
    refused("train_vq.py", "--data", tmp_path / "third", *flags, says=["10 of ", "1%", "bad"])
    (tmp_path / "empty" / "a").mkdir(parents=True)
    refused("train_vq.py", "--data", tmp_path / "empty", *flags, says=["empty", "no images"])
    make_folder(tmp_path / "uneven" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "uneven" / "val", {"a": 2})
    refused("train_vq.py", "--data", tmp_path / "uneven", *flags, says=["'b'", "val"])
    refused("train_vq.py", "--data", "imagnet", *flags, says=["imagnet", "shapes", "folder"])
    assert not (tmp_path / "run" / "vqgan.pt").exists()


# ---- cached tokens

def test_cached_tokens_hold_each_view_of_each_image_once(tmp_path, monkeypatch):
    class Images:
        """The "tokens" of an image are its index and the draw of its augmentation."""
        classes, workers = ["even", "odd"], 0
        def __len__(self): return 50
        def batch(self, indices, draws):
            return torch.tensor(np.stack([indices, draws % 1000], 1)), torch.tensor(indices % 2)

    monkeypatch.setattr(CachedTokens, "CHUNK", 40)
    monkeypatch.setattr(CachedTokens, "BATCH", 16)
    cached, encoded = CachedTokens(tmp_path, Images(), 4, 2), []
    for rank, rows in ((0, 120), (1, 80)):                  # three of the five chunks, then the other two
        cached.encode(lambda images: encoded.append(images) or images, rank, 2)
        assert sum(map(len, encoded)) == rows
        encoded.clear()
    indices = np.arange(50).repeat(40)
    tokens, labels = cached.batch(indices, np.arange(2000))
    assert np.array_equal(tokens[:, 0], indices) and np.array_equal(labels, indices % 2)
    for index in range(50):                                 # all four views are drawn, and no two are augmented alike
        assert len(tokens[indices == index, 1].unique()) == 4
    assert torch.equal(cached.batch(indices, np.arange(2000))[0], tokens)


# ---- classes

def test_classes_are_found_by_id_and_by_name():
    classes = ["Fish", "catfish", "dog", "cat"]
    assert [find_class(text, classes) for text in ("3", "fish", "CATF", "do", "cat", "Cat")] == [3, 0, 1, 2, 3, 3]
    for text, message in (("4", "class 4 does not exist.*0 to 3"), ("i", "'i' fits several: Fish, catfish$"),
                          ("bird", "unknown class 'bird'; this run has Fish, catfish, dog, cat$")):
        with pytest.raises(ValueError, match=message):
            find_class(text, classes)
    with pytest.raises(ValueError, match=r"'x'; this run has 0y, .*11y, \.\.\.$"):
        find_class("x", [f"{i}y" for i in range(13)])


# ---- files that are written

def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda file: file.write(b"old"))
    with open(path, "rb") as reader:
        write_atomically(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old"                          # who has opened it goes on reading what it was
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error, raised", [
    (OSError(errno.ENOSPC, "No space left on device"), OSError), (RuntimeError("zip writer"), OSError),
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
    if raised is OSError:
        assert str(path) in str(caught.value) and "free some space" in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
