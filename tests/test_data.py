"""The data sets: drawn, from an archive, and from folders as untidy as real ones."""
import hashlib
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import TINY_VQ, refused, run
from data import Shapes, batches, open_data, read_cifar, read_image

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
    code = ("import hashlib, data; print(hashlib.md5(data.Shapes('val').batch(range(20))[0].contiguous().numpy().tobytes()).hexdigest())")
    here = hashlib.md5(val.batch(range(20))[0].contiguous().numpy().tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=data.__file__.rsplit("/", 1)[0])
    assert there.stdout.strip() == here


def test_shapes_vary_and_are_shaded():
    images, labels = Shapes("train").batch(range(2000))
    assert torch.bincount(labels).tolist() == [200] * 10
    assert len(torch.unique(images.flatten(1), dim=0)) == 2000
    # Anti-aliased and graded: far more colours in an image than two flat ones.
    assert min(len(torch.unique(image.flatten(1).T, dim=0)) for image in images[:50]) > 150


def test_hashed_uniform_is_uniform():
    u = data.hashed_uniform(1, range(20_000), 4)
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.std() - 12 ** -0.5) < 0.005
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03 and abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.03


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
    assert not torch.equal(order, torch.cat([indices for indices, _ in batches(Indices(), 4, 8, 0, 10)]))


# ---- CIFAR-10

def cifar_archive(path):
    rng = np.random.default_rng(0)
    records = {f"{n}.bin": rng.integers(0, 256, (5, 3073), dtype=np.uint8) for n in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]}
    files = {name: record.tobytes() for name, record in records.items()} | {"batches.meta.txt": b"airplane\nbird\n\n"}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return records


def test_cifar_is_read_from_its_records(tmp_path):
    records = cifar_archive(tmp_path / "cifar.tar.gz")
    classes, images, labels = read_cifar(tmp_path / "cifar.tar.gz", "train")
    assert classes == ["airplane", "bird"] and images.shape == (25, 3, 32, 32)
    assert np.array_equal(images[6], records["data_batch_2.bin"][1, 1:].reshape(3, 32, 32))
    assert labels[6] == records["data_batch_2.bin"][1, 0]
    assert len(read_cifar(tmp_path / "cifar.tar.gz", "val")[1]) == 5


def test_cifar_with_a_wrong_checksum(tmp_path):
    (tmp_path / "data").mkdir()
    cifar_archive(tmp_path / "data" / "cifar-10-binary.tar.gz")
    refused("train_vq.py", "--data", "cifar10", *TINY_VQ, says=["cifar-10-binary.tar.gz", "checksum", "delete it"], cwd=tmp_path)


# ---- folders

@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV",
                                  "I", "I;16", "I;16B", "F"])
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
    assert upright.size == (10, 20) and upright.getpixel((5, 2))[0] < 60 < 200 < upright.getpixel((5, 17))[0]


def test_folder_classes_holdout_and_crops(tmp_path):
    make_folder(tmp_path, {"b": 60, "a/deep/er": 60, ".hidden": 3})
    (tmp_path / "b" / ".DS_Store").write_text("not an image")
    train, val = open_data(str(tmp_path), 16)
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
    one, same, other, plain = (train.batch(np.array([0]), draws)[0] for draws in (np.array([1]), np.array([1]), np.array([2]), None))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, plain)


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
    output = run("train_vq.py", "--data", "imagenet", "--image-size", 32, *TINY_VQ, "--filters", 32, "--steps", 2, cwd=tmp_path)
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
    refused("train_vq.py", "--data", tmp_path / "third", "--run", tmp_path / "run", *TINY_VQ, says=["10 of ", "1%", "bad"])
    (tmp_path / "empty" / "a").mkdir(parents=True)
    refused("train_vq.py", "--data", tmp_path / "empty", "--run", tmp_path / "run", *TINY_VQ, says=["empty", "no images"])
    make_folder(tmp_path / "uneven" / "train", {"a": 2, "b": 2})
    make_folder(tmp_path / "uneven" / "val", {"a": 2})
    refused("train_vq.py", "--data", tmp_path / "uneven", "--run", tmp_path / "run", *TINY_VQ, says=["'b'", "val"])
    refused("train_vq.py", "--data", "imagnet", "--run", tmp_path / "run", *TINY_VQ, says=["imagnet", "shapes", "folder"])
    assert not (tmp_path / "run" / "vqgan.pt").exists()
