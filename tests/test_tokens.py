"""The token cache: each view of each image once, and encoded anew when an image changes."""
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY_TRANSFORMER, run
from PIL import Image
from test_data import assert_ends, make_folder, start

from lib import tokens
from lib.data import open_data
from lib.errors import UserError
from lib.files import fingerprint, load_checkpoint, rebuild, save_checkpoint
from lib.loader import VIEW_SEEDS, read_ahead
from lib.runtime import Machine, hashed_uniform
from lib.shapes import Shapes
from lib.tokens import CachedTokens, FrozenTokenizer, Views
from vqgan import VQGAN


class Images:
    """The "tokens" of an image are its index and the draw of its augmentation."""

    classes = ["even", "odd"]
    workers = 0

    def __init__(self, count=50):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices, seeds):
        return torch.tensor(np.stack([indices, seeds % 1000], 1)), torch.tensor(indices % 2)

    def signatures(self):
        return np.arange(self.count, dtype=np.uint64)


class Tokenize:
    """Stands for the tokenizer: every image its own tokens, by its own pixels. Counts the images that it sees."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images[:, :, ::16, ::16].flatten(1).long()


def one_of(world, rank):
    """Returns a machine that takes itself for one of several ranks."""
    machine = Machine("cpu")
    machine.rank = rank
    machine.world = world
    machine.leads = rank == 0
    return machine


def encode(cached, rank=0, world=1):
    """How many views of images had to be encoded."""
    tokenize = Tokenize()
    cached.encode(tokenize, one_of(world, rank))
    return tokenize.seen


def test_cached_tokens_hold_each_view_of_each_image_once(tmp_path, monkeypatch):
    monkeypatch.setattr(CachedTokens, "ROWS", 40)
    monkeypatch.setattr(CachedTokens, "BATCH", 16)
    cached, encoded = CachedTokens(tmp_path, Images(), 4, 2, 1000), []
    for rank, rows in ((0, 120), (1, 80)):                  # three of the five chunks, then the other two
        cached.encode(lambda images: encoded.append(images) or images, one_of(2, rank))
        assert sum(map(len, encoded)) == rows and max(map(len, encoded)) == 16
        encoded.clear()
    indices = np.arange(50).repeat(40)
    tokens, labels = cached.batch(indices, np.arange(2000))
    assert np.array_equal(tokens[:, 0], indices) and np.array_equal(labels, indices % 2)
    for index in range(50):                                 # all four views are drawn, and no two are augmented alike
        assert len(tokens[indices == index, 1].unique()) == 4
    assert torch.equal(cached.batch(indices, np.arange(2000))[0], tokens)


def test_cached_tokens_are_those_encoded_on_the_fly(tmp_path, monkeypatch):
    make_folder(tmp_path / "images", {"a": 12, "b": 9})
    train, _ = open_data(str(tmp_path / "images"), 32)
    monkeypatch.setattr(CachedTokens, "ROWS", 16)
    cached = CachedTokens(tmp_path / "tokens", train, 3, 12, 256)
    assert encode(cached, 0, 2) + encode(cached, 1, 2) == 3 * len(train)     # ranks share the chunks
    indices = [0, len(train) - 1, 5]
    tokens, labels = cached.batch(indices, [3, 4, 5])
    assert torch.equal(labels, train.batch(indices)[1]) and tokens.shape == (3, 12)
    view = int(hashed_uniform(5, [3], 1)[0, 0] * 3)
    again = train.batch([0], [view * len(train) + VIEW_SEEDS])[0]
    assert torch.equal(tokens[0].long(), Tokenize()(again)[0])
    os.remove(cached.paths[1])                              # a half-written cache goes on: what is there stays
    assert encode(CachedTokens(tmp_path / "tokens", train, 3, 12, 256)) == 16


def test_all_tpu_hosts_encode_all_chunks_and_the_first_writes_them(tmp_path, monkeypatch):
    """Their chips work on every batch together, so all hosts must have the same batch."""
    monkeypatch.setattr(CachedTokens, "ROWS", 40)
    encoded = []
    for rank, files in ((1, 0), (0, 5)):
        machine = one_of(2, rank)
        machine.mesh = "the chips of both hosts"
        machine.sync = machine.wait_for_ranks = lambda: None
        CachedTokens(tmp_path, Images(), 4, 2, 1000).encode(lambda images: encoded.append(images) or images, machine)
        assert sum(map(len, encoded)) == 200 and len(list(tmp_path.glob("*.npy"))) == files
        encoded.clear()


@pytest.mark.parametrize("given, used", [(None, 0), (3, 3)])
def test_as_many_readers_encode_as_are_asked_for(given, used, tmp_path, monkeypatch):
    told = []

    def read_in_this_process(dataset, keys, workers, pin_memory):
        told.append(workers)
        return read_ahead(dataset, keys, 0)
    monkeypatch.setattr(tokens, "read_ahead", read_in_this_process)
    CachedTokens(tmp_path, Images(), 1, 2, 1000).encode(lambda images: images, Machine("cpu"), given)
    assert told == [used]


def test_a_codebook_that_the_cache_cannot_hold_is_refused_at_once(tmp_path):
    CachedTokens(tmp_path, Images(), 1, 2, 2 ** 16)
    with pytest.raises(UserError, match="16 bits.*--cache-tokens 0"):
        CachedTokens(tmp_path, Images(), 1, 2, 2 ** 16 + 1)


def change_colour(path):
    """Replaces a picture by one of the same size."""
    status = os.stat(path)
    Image.new("RGB", (40, 30), "blue").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_the_tokens_of_another_data_set_are_not_taken(tmp_path):
    """Both have 50,000 images that never change, and ten classes."""
    shapes = Shapes("train")
    others = Shapes("train")
    others.classes = list("abcdefghij")
    ours, theirs = (CachedTokens(tmp_path, data, 1, 64, 256).paths for data in (shapes, others))
    assert len(ours) == len(theirs) and not set(ours) & set(theirs)


def test_images_that_change_are_encoded_anew(tmp_path, monkeypatch, capsys):
    """Replaced, moved to another class, more, in other views: what is in the cache is that of the images."""
    root = tmp_path / "images"
    make_folder(root, {"a": 40, "b": 40})
    monkeypatch.setattr(CachedTokens, "ROWS", 16)

    def encoded(views=2, num_tokens=12):
        train, _ = open_data(str(root), 32)
        cached = CachedTokens(tmp_path / "tokens", train, views, num_tokens, 256)
        count = encode(cached)
        everything = np.concatenate(cached.arrays)
        assert len(everything) == views * len(train)
        for row in (0, 7, len(train) - 1, len(everything) - 1):
            image, label = Views(train)[range(row, row + 1)]
            assert np.array_equal(everything[row], [*Tokenize()(image)[0], label[0]])
        said = capsys.readouterr().err
        assert ("encoded anew" in said) == (len(list((tmp_path / "tokens").iterdir())) > 0 and count > 0 and told)
        return count, len(everything), train

    told = False                                            # the first time there is nothing to remove
    count, rows, train = encoded()
    assert count == rows
    assert encoded()[0] == 0                                # the same images
    told = True
    change_colour(train.path(3))
    assert encoded()[0] == 32                               # one chunk of each view
    changed = root / "b" / "moved.png"
    os.rename(train.path(0), changed)
    assert encoded()[0] > rows - 16 * 3
    make_folder(root, {"0": 1})                             # a new class: all labels change
    count, rows, _ = encoded()
    assert count == rows
    assert encoded(num_tokens=13)[0] == rows                # of another image size, say
    told = False
    count, more, _ = encoded(views=3, num_tokens=13)
    assert more - rows <= count < more - rows + 16          # the views that are there stay
    assert encoded(num_tokens=13)[0] == 0                   # also the chunk that is not full: another decoder's
    told = True
    files = set((tmp_path / "tokens").glob("*.npy"))
    (root / "b" / "005.png").rename(tmp_path / "005.png")   # one image fewer: all chunks are others
    count, rows, _ = encoded(num_tokens=13)
    assert count == rows and not files & set((tmp_path / "tokens").glob("*.npy"))
    (tmp_path / "005.png").rename(root / "b" / "005.png")
    os.utime(root / "b" / "005.png")
    assert encoded(views=3, num_tokens=13)[0] >= 48


def test_a_tail_is_encoded_without_the_compiler(untrained, monkeypatch):
    """torch.compile makes a program for each number of images: a minute for the last few of a set."""
    compiled_sizes = []

    def compiled(machine, function):
        return lambda images: compiled_sizes.append(len(images)) or function(images)
    monkeypatch.setattr(Machine, "compile", compiled)
    tokenizer = FrozenTokenizer(untrained / "vqgan.pt", VQGAN, None, 8, Machine("cpu"))
    images, _ = Shapes("val").batch(np.arange(21))
    tokens = tokenizer.encode(images)
    assert compiled_sizes == [8, 8]
    assert torch.equal(tokens[16:], tokenizer.encode(images[16:])) and len(tokens) == 21


def test_files_that_never_change_are_known_by_path_and_class(tmp_path):
    """The times of ImageNet's million files would take minutes to read from a network disk."""
    for split in ("train", "val"):
        make_folder(tmp_path / "imagenet" / split, {"a": 3, "b": 3})
    before = open_data("imagenet", 32, tmp_path)[0].signatures()
    os.utime(tmp_path / "imagenet" / "train" / "a" / "000.png", (1, 1))
    assert np.array_equal(open_data("imagenet", 32, tmp_path)[0].signatures(), before)
    os.rename(tmp_path / "imagenet" / "train" / "a" / "000.png", tmp_path / "imagenet" / "train" / "b" / "000.png.png")
    after = open_data("imagenet", 32, tmp_path)[0].signatures()
    assert len(np.intersect1d(before, after)) == 5


def test_the_token_cache_holds_few_files_open(tmp_path):
    cached = CachedTokens(tmp_path, Images(1_281_167), 10, 256, 1024)
    assert len(cached.paths) <= 256 and cached.chunk_rows * len(cached.paths) >= 12_811_670


def test_readers_need_little_shared_memory():
    """Eight ranks of sixteen readers, each two batches ahead, at 256 pixels: 3.2 GB."""
    assert 8 * 16 * 2 * CachedTokens.BATCH * 3 * 256 ** 2 < 4e9


@pytest.mark.parametrize("size", [8, 80])                   # from memory, and by readers
def test_encoding_is_stopped_by_a_signal(size, tmp_path, capfd):
    make_folder(tmp_path / "images", {"a": 100})
    encoding = multiprocessing.Event()

    def tokenize(images):
        encoding.set()
        time.sleep(0.1)
        return images[:, 0, 0, :2].long()

    def main():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        train, _ = open_data(str(tmp_path / "images"), size)
        CachedTokens(tmp_path / "tokens", train, 1000, 2, 256).encode(tokenize, Machine("cpu"))
    process = start(main)
    assert encoding.wait(30)
    os.kill(process.pid, signal.SIGINT)
    assert_ends(process, 10, code=130)
    assert "stopped while encoding images" in capfd.readouterr().err


@pytest.mark.slow
def test_training_from_cached_tokens(trained, tmp_path):
    """A folder of tokens for each tokenizer, in the run; another number of views is encoded beside them, and they stay."""
    make_folder(tmp_path / "images", {"a": 12, "b": 9})
    flags = ["--data", tmp_path / "images", "--vqgan", trained / "vqgan.pt", *TINY_TRANSFORMER]
    run("train_transformer.py", "--run", tmp_path / "cached", *flags, "--cache-tokens", 2)
    assert len(list((tmp_path / "cached" / "tokens").glob("*/20-0-*.npy"))) == 1
    shutil.copytree(tmp_path / "cached" / "tokens", tmp_path / "other" / "tokens")
    output = run("train_transformer.py", "--run", tmp_path / "other", *flags, "--cache-tokens", 3)
    assert "encoded anew" not in output
    assert len(list((tmp_path / "other" / "tokens").glob("*/20-0-*.npy"))) == 2


def test_a_tokenizer_that_is_not_trained_to_its_end_is_named(untrained, tmp_path, capsys):
    checkpoint = load_checkpoint(untrained / "vqgan.pt", "vqgan")
    for step, words in ((5, "trained for 5 of 6 steps"), (6, "")):
        save_checkpoint(tmp_path / "vqgan.pt", checkpoint | {"step": step, "settings": {"steps": 6}})
        FrozenTokenizer(tmp_path / "vqgan.pt", VQGAN, None, 8, Machine("cpu"))
        printed = capsys.readouterr().err
        assert words in printed and bool(printed) == bool(words)


def test_the_tokenizer_is_kept_as_it_was_read(untrained, tmp_path):
    """Its file may be trained on while images are encoded."""
    shutil.copy(untrained / "vqgan.pt", tmp_path / "other.pt")
    tokenizer = FrozenTokenizer(tmp_path / "other.pt", VQGAN, None, 8, Machine("cpu", bf16=True))
    (tmp_path / "other.pt").write_text("another")
    tokenizer.copy_to(tmp_path / "vqgan.pt")
    copy, checkpoint = rebuild(tmp_path / "vqgan.pt", "vqgan", VQGAN)
    assert fingerprint(copy) == tokenizer.fingerprint
    assert checkpoint.keys() == load_checkpoint(untrained / "vqgan.pt", "vqgan").keys()


def test_a_run_keeps_the_tokenizer_it_has(untrained, tmp_path):
    tokenizer = FrozenTokenizer(untrained / "vqgan.pt", VQGAN, None, 8, Machine("cpu"))
    path = tmp_path / "vqgan.pt"
    tokenizer.check_same_as(path)
    tokenizer.copy_to(path)
    tokenizer.check_same_as(path)
    assert path.read_bytes() == (untrained / "vqgan.pt").read_bytes()
    other = load_checkpoint(path, "vqgan")
    other["model"]["decoder.layers.0.weight"] += 1
    save_checkpoint(path, other)
    with pytest.raises(UserError, match="another tokenizer.*--overwrite"):
        tokenizer.check_same_as(path)
