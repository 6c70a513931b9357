"""evaluate.py and its metrics: against plain computations, torch-fidelity, an interruption, two ranks."""
import functools
import json
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_TRANSFORMER, run
from PIL import Image

import evaluate
from lib import features as features_
from lib import ledger, metrics, pictures, runtime
from lib.features import Batch, Features, Subset, fair_choice, load_classifier
from lib.ledger import Ledger
from lib.sampling import load_run
from maskgit import SCHEDULES, MaskGIT, decode
from vqgan import VQGAN, as_grid

QUICK = ["--num", "30", "--batch", "10", "--classifier-steps", "3"]


def statistics(features):
    shift = features[:3].double().mean(0)
    return metrics.gaussian(metrics.moments(features, shift), shift)


def plain_frechet(x, y):
    """In float64 and without any matrix root: C1 = aᵀa and C2 = bᵀb, and the eigenvalues of C1 C2 are the squares of
    the singular values of a bᵀ."""
    a, b = ((z - z.mean(0)).numpy() / np.sqrt(len(z) - 1) for z in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square((x.mean(0) - y.mean(0)).numpy()).sum() + np.square(a).sum() + np.square(b).sum() - 2 * overlap


def plain_inception_score(logits):
    """Mean and deviation over ten splits, dealt out as torch-fidelity does."""
    scores, order = [], np.random.RandomState(2020).permutation(len(logits))
    for i in range(10):
        p = logits.softmax(1)[order[i * len(logits) // 10:(i + 1) * len(logits) // 10]].numpy()
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


def load(folder, decoder=None):
    """-> tokenizer, transformer, validation images of a run."""
    _, tokenizer, transformer, _ = load_run(folder, runtime.Machine("cpu"), VQGAN, MaskGIT, decoder=decoder)
    return tokenizer, transformer, evaluate.open_data("shapes", 32)[1]


def evaluated(folder, *flags):
    """Runs evaluate.py on a run in this process -> what it wrote to eval.json."""
    args = evaluate.parse_flags(["--run", str(folder), *QUICK, *map(str, flags)])
    evaluate.evaluate(args, runtime.Machine("cpu"))
    return json.loads((folder / "eval.json").read_text())


def assert_same(a, b, tolerance=0):
    """Nested dicts and lists of numbers."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y, tolerance)
    elif isinstance(a, float):
        assert abs(a - b) <= tolerance * max(1, abs(a)), (a, b)
    else:
        assert a == b


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the toy run."""
    return shutil.copytree(trained, tmp_path / "shapes")


# ---- metrics.py

@pytest.mark.parametrize("n, m, D", [(400, 300, 20), (30, 50, 100), (30, 400, 60)])     # last: singular covariances
def test_frechet_distance(n, m, D):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=g).double()
    x = torch.randn(n, D, generator=g).double() @ mix + 100
    y = torch.randn(m, D, generator=g).double() @ mix * 1.1 + 99
    found = metrics.frechet_distance(*statistics(x), *statistics(y))
    assert found == pytest.approx(plain_frechet(x, y), rel=1e-6)
    (mean1, c1), (mean2, c2) = ((z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    if D < min(n, m):                                                                      # as in the formula
        roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real
        by_the_formula = np.square(mean1 - mean2).sum() + np.trace(c1 + c2) - 2 * roots.sum()
        assert found == pytest.approx(by_the_formula, rel=1e-6)
    assert metrics.frechet_distance(*statistics(x), *statistics(x)) < 1e-6 * np.trace(c1)


def test_streaming_sums_are_those_of_all_at_once():
    g = torch.Generator().manual_seed(1)
    x, logits = 1e6 + torch.randn(101, 7, generator=g).double(), 3 * torch.randn(101, 5, generator=g).double()
    split, shift, book = metrics.split_of(101), x[:10].mean(0), Ledger(None, None, runtime.Machine("cpu"), 10)
    sums = book.add_up(
        "x", 101, lambda numbers: (slice(10 * b, 10 * b + 10) for b in numbers),
        lambda part: (metrics.moments(x[part], shift) | metrics.score_sums(logits[part], split[part]), {}))
    mean, covariance, root = metrics.gaussian(sums, shift)
    expected = np.cov(x.numpy(), rowvar=False)
    assert np.allclose(mean, x.numpy().mean(0), rtol=1e-10, atol=0)
    assert np.abs(covariance.numpy() - expected).max() < 1e-10 * np.abs(expected).max()
    assert torch.allclose(root @ root.T, covariance)
    assert np.allclose(metrics.inception_score(sums), plain_inception_score(logits), rtol=1e-10, atol=0)
    # All alike: 1. Each sure of a class of its own, as often: the number of classes.
    alike, apart = torch.zeros(60, 6), 1e3 * torch.eye(6).repeat(10, 1)
    for logits, score in ((alike, 1), (apart, 6)):
        sums = metrics.score_sums(logits, torch.zeros(60, dtype=torch.long))
        assert metrics.inception_score(sums)[0] == pytest.approx(score)


@pytest.mark.parametrize("n, m, repeat", [(40, 57, False), (57, 40, True), (4, 9, False)])
def test_precision_and_recall(n, m, repeat):
    """repeat: many points coincide, so that many radii and distances are exactly 0."""
    g = np.random.default_rng(n)
    x, y, few = (1e7 + g.standard_normal((k, 6)) for k in (n, m, 12))
    if repeat:
        x, y = few[g.integers(0, 8, n)], few[g.integers(4, 12, m)]

    def near(images, others, k=3):
        def squares(p):
            return ((others - p) ** 2).sum(1)
        radii = np.array([np.sort(squares(p))[k] for p in others])
        return np.mean([(squares(p) <= radii).any() for p in images])

    found = metrics.precision_recall(torch.tensor(x), torch.tensor(y), rows=7)
    assert found == (near(x, y), near(y, x)) and (n < 10 or 0 < min(found) < 1)
    with pytest.raises(ValueError, match="at least 4"):
        metrics.precision_recall(torch.tensor(x)[:3], torch.tensor(y))


def test_measures_of_pixels():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 16, 16, generator=g)
    noisy = images + 0.1 * torch.tensor([1., -1.]).repeat(8)
    assert torch.allclose(metrics.psnr(images, noisy), torch.tensor(20.).double(), atol=1e-4)
    assert (metrics.psnr(images, images) == 100).all()

    # An edge of height 0.5 in one of the 15 steps of each row, that is in less than a tenth of all places.
    edge = torch.cat([torch.zeros(1, 3, 16, 5), torch.full((1, 3, 16, 11), 0.5)], -1)
    assert metrics.sharpness(edge).item() == pytest.approx(0.5 * 16 / (240 // 10))


# ---- ledger.py

class Rank:
    """A machine that is one of several threads: its ranks add up through a shared list."""
    device, rank, world, leads = torch.device("cpu"), 0, 1, True

    def __init__(self, rank, world, barrier, shared):
        self.rank, self.world, self.leads, self.barrier, self.shared = rank, world, rank == 0, barrier, shared

    def sync(self):
        pass

    def mean(self, tensor):
        self.shared[self.rank] = tensor
        self.barrier.wait()
        result = torch.stack(self.shared).sum(0) / self.world
        self.barrier.wait()
        return result

    def any(self, flag):
        return self.mean(torch.tensor([float(flag)]))[0] > 0


def added_up(monkeypatch, world, work):
    """Calls work(machine) in a thread for each of `world` ranks -> what it returns on each."""
    machines, results = threading.local(), [None] * world
    monkeypatch.setattr(ledger, "mean_over_ranks", lambda tensor: machines.own.mean(tensor))
    barrier, shared = threading.Barrier(world, timeout=20), [None] * world

    def on_a_rank(rank):
        machines.own = Rank(rank, world, barrier, shared)
        results[rank] = work(machines.own)
    threads = [threading.Thread(target=on_a_rank, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def numbered(numbers, count=11, stop=None):
    """Batches of three of the numbers 0 .. count - 1; what is asked for after `stop` of them fails."""
    for done, b in enumerate(numbers):
        if done == stop:
            raise KeyboardInterrupt
        rows = torch.arange(3 * b, min(3 * b + 3, count))
        yield {"sum": rows.sum().double(), "squares": rows.square().sum().double()}, {"number": rows, "unused": None}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("before", [None, 1, 2])
def test_ranks_and_runs_count_every_batch_once(world, before, tmp_path, monkeypatch):
    """11 numbers in four batches, the last one short. before: the number of ranks of a run that was interrupted."""
    monkeypatch.setattr(Ledger, "SAVE_SECONDS", -1)                          # the ranks add up after every round

    def interrupted(machine):
        book = Ledger(tmp_path, {"a": 1}, machine, 3)
        with pytest.raises(KeyboardInterrupt):
            book.add_up("x", 11, functools.partial(numbered, stop=1), tuple, {"number": 7})

    def finished(machine):
        book = Ledger(tmp_path, {"a": 1}, machine, 3)
        assert min(book.batches_left("x", 11)) == min((before or 0) + machine.rank, 3)
        sums = book.add_up("x", 11, numbered, tuple, {"number": 7})
        more = book.add_up("y", 11, numbered, tuple, {"number": 20})
        assert more["number"].tolist() == list(range(11))                    # there are no more than 11 to keep
        # Asked for again, nothing is left to do, for any rank.
        assert book.batches_left("x", 11) == [] and book.add_up("x", 11, numbered, tuple, {"number": 7}) is sums
        return sums
    if before:
        added_up(monkeypatch, before, interrupted)
    for sums in added_up(monkeypatch, world, finished):
        assert sums["number"].tolist() == list(range(7)) and "unused" not in sums
        assert sums["sum"] == 55 and sums["squares"] == 385


def test_whole_numbers_stay_whole(monkeypatch):
    """Over 49 ranks a mean times 49 is not always the sum: 1 / 49 * 49 < 1."""
    monkeypatch.setattr(ledger, "mean_over_ranks", lambda tensor: tensor / 49)
    book = Ledger(None, None, SimpleNamespace(device="cpu", world=49), 10)
    assert torch.equal(book._over_ranks({"tokens": torch.arange(1000)})["tokens"], torch.arange(1000))


def test_results_are_kept_with_their_setup(tmp_path):
    machine = runtime.Machine("cpu")

    def opened(setup, again=False):
        return Ledger(tmp_path, {"setup": setup}, machine, 3, again)
    for setup, figure in ((1, 10.0), (2, 20.0)):
        book = opened(setup)
        assert book.results == {}
        for condition in ("half done", "x"):
            book.add_up(condition, 11, numbered, tuple)
        book.keep("x", {"FCD": figure})
        book.keep("y", {"FCD": figure})
    for setup, figure in ((1, 10.0), (2, 20.0)):
        assert opened(setup).results == {"x": {"FCD": figure}, "y": {"FCD": figure}}
    assert opened(1).batches_left("half done", 11) == [0, 1, 2, 3] and opened(2).batches_left("half done", 11) == []
    assert list(opened(2).under_way) == ["half done"]                        # the sums of x are no longer needed
    assert opened(2, again=True).results == {} and opened(2, again=True).batches_left("half done", 11) == [0, 1, 2, 3]
    opened(2, again=True).keep("x", {"FCD": 21.0})
    assert opened(1).results["x"]["FCD"] == 10.0
    assert opened(2).results == {"x": {"FCD": 21.0}, "y": {"FCD": 20.0}}
    (tmp_path / "eval.json").write_text("[]")
    (tmp_path / "eval.resume.pt").write_text("damaged")
    assert opened(2).results == {} and opened(2).batches_left("half done", 11) == [0, 1, 2, 3]


# ---- classifier.py

class ByShade(torch.nn.Module):
    """Stands for a classifier of ten classes: an image of class c is all of the shade 20 c."""

    def __init__(self):
        super().__init__()
        self.calls = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def features(self, images):
        return images[:, :, ::8, ::8].flatten(1)

    def out(self, features):
        return -1e3 * (features.mean(1, keepdim=True) - torch.arange(10) * 20 / 255).abs()

    def forward(self, images):
        return self.out(self.features(images))


def shades(labels, size=16):
    """uint8 images of these classes, with a little noise."""
    noise = torch.randint(0, 5, (len(labels), 3, size, size), generator=torch.Generator().manual_seed(0))
    return (labels[:, None, None, None] * 20 + noise).to(torch.uint8)


def seen(features, images, labels, size):
    """The sums over images in batches of `size`, with the features."""
    book, split = Ledger(None, None, features.machine, size), metrics.split_of(len(images))

    def read(numbers):
        return (Batch(b, *(of_all[size * b:][:size] for of_all in (split, images, labels))) for b in numbers)
    return book.add_up("x", len(images), read, features.sums, {"features": len(images)})


def test_what_is_seen_in_images():
    """By hand, and the same in batches of any size."""
    machine, labels = runtime.Machine("cpu"), torch.arange(50) % 10
    images, real = shades(labels), shades(labels.flip(0))
    named = labels.clone()
    named[:10] = 3                                                   # what is drawn in place of classes 0 to 9, once
    images[:10] = shades(named[:10])
    features = Features(machine, list("abcdefghij"), ByShade(), None, real[:5])
    assert (features.distance, features.score) == ("FCD", "IS(classifier)") and features.name.startswith("the class")
    of_real = seen(features, real, labels.flip(0), 50)
    whole = features.figures(seen(features, images, labels, 50), of_real)
    assert_same(whole, features.figures(seen(features, images, labels, 7), of_real), 1e-7)
    x, y = (ByShade().features(z / 255).double() for z in (images, real))
    assert whole["FCD"] == pytest.approx(plain_frechet(x, y), rel=1e-6)
    score = plain_inception_score(ByShade().out(x))
    assert (whole["IS(classifier)"], whole["± over splits"]) == pytest.approx(score, rel=1e-6)
    assert (whole["precision"], whole["recall"]) == metrics.precision_recall(x, y) and whole["recall"] < 1
    assert whole["classifier names the class"] == 41 / 50
    assert whole["classifier names the class, by class"] == {c: 1 if c == "d" else 0.8 for c in "abcdefghij"}

    # Blurred images are less sharp than real ones, and copies as sharp.
    flat = real.float().mean((2, 3), keepdim=True).expand_as(real).to(torch.uint8)
    found = features.figures(seen(features, flat, labels.flip(0), 10), of_real)
    assert found["sharpness / real"] == 0
    twice = seen(features, real.repeat_interleave(2, 0), labels.flip(0).repeat_interleave(2), 10)
    twice = features.figures(twice, of_real)
    assert twice["sharpness / real"] == pytest.approx(1)

    # Inception's features are used where it is there, and the classifier only names classes.
    def inception(images):
        return images[:, 0, :4, 0].float(), torch.zeros(len(images), 5)
    inception.state_dict = dict
    both = Features(machine, list("abcdefghij"), ByShade(), inception, real[:5])
    row = both.figures(seen(both, images, labels, 10), seen(both, real, labels.flip(0), 10))
    assert row["classifier names the class"] == 41 / 50 and row["IS"] == pytest.approx(1)
    expected = plain_frechet(images[:, 0, :4, 0].double(), real[:, 0, :4, 0].double())
    assert row["FID"] == pytest.approx(expected, rel=1e-6)


class Drawn:
    """A data set of the shades of ten classes, in their order: sorted by class."""
    classes, workers = list("abcdefghij"), 0

    def __init__(self, size=16):
        self.size = size

    def __len__(self):
        return 200

    def batch(self, indices, draws=None):
        labels = torch.as_tensor(indices) // 20
        return shades(labels, self.size), labels


def test_training_and_testing_a_classifier(capsys):
    machine = runtime.Machine("cpu")
    model = features_.train_classifier(Drawn(), 40, 0, machine, "classifier of shades")
    assert not model.training and "classifier of shades: 40 of 40 steps" in capsys.readouterr().out
    subset = Subset(Drawn(), fair_choice(Drawn(), 90), 40)
    assert sorted(set(subset.indices // 20)) == list(range(10)) and len(set(subset.indices)) == 90      # no two alike
    assert [batch.number for batch in subset.read([0, 2])] == [0, 2] and len(next(subset.read([2])).images) == 10
    first, fifth = features_.accuracy(model, subset, machine)
    assert first > 0.3 and fifth > 0.75                              # by chance: 0.1 and 0.5

    def by_rank(images):          # the right class comes first in the upper third of the classes, else fifth or sixth
        label = (images.mean((1, 2, 3)) * 255 / 20).floor().long()[:, None]
        distance = (torch.arange(10) - label) % 10
        return -torch.where(distance == 0, torch.where(label < 3, 0, torch.where(label < 6, 4.5, 5.5)), distance)
    shares = [sum(label < limit for label in subset.indices // 20) / 90 for limit in (3, 6)]
    assert features_.accuracy(by_rank, subset, machine) == pytest.approx(shares)


# ---- evaluate.py, with a transformer and a tokenizer that draw what they are asked for

class Painter(torch.nn.Module):
    """A tokenizer of 2 x 2 tokens whose images are 16 pixels wide: token c is drawn in the shade of class c."""
    config = SimpleNamespace(stride=8, codebook_size=10)

    def encode(self, images):
        return (images * 255 / 20).floor().long().amax(1)[:, ::8, ::8]

    def decode(self, tokens):
        return (tokens.repeat_interleave(8, 1).repeat_interleave(8, 2) * 20 / 255)[:, None].expand(-1, 3, -1, -1)


def obedient(model, labels, known=None, generator=None, **options):
    """In place of decode(): every unknown token is that of the class asked for."""
    tokens = labels[:, None].expand(-1, model.config.num_tokens)
    return tokens if known is None else torch.where(known == model.mask_id, tokens, known)


@pytest.fixture
def task(monkeypatch):
    """25 images of ten classes, in batches of 8."""
    monkeypatch.setattr(evaluate, "decode", obedient)
    machine = runtime.Machine("cpu")
    transformer = SimpleNamespace(config=SimpleNamespace(causal=False, num_classes=10, num_tokens=4), mask_id=20)
    args = SimpleNamespace(num=25, batch=8, seed=0, seeds=2, classifier_steps=5)
    real = Subset(Drawn(), fair_choice(Drawn(), 25), 8)
    return SimpleNamespace(args=args, machine=machine, ledger=Ledger(None, None, machine, 8), title="", options={},
                           likelihoods=dict.fromkeys(SCHEDULES, transformer),
                           tokenizer=Painter(), transformer=transformer, train=Drawn(), real=real,
                           features=Features(machine, Drawn.classes, ByShade(), None, real[0].images))


def sums_of_real(task):
    read = Subset(Drawn(), np.arange(200), 8).read
    return task.ledger.add_up("real", 200, read, task.features.sums, evaluate.FEATURES)


def test_samples_are_counted_as_the_class_that_was_asked_for(task, monkeypatch):
    trained_on, tested_on = [], []
    monkeypatch.setattr(features_, "train_classifier", lambda data, *_: trained_on.append(data))
    monkeypatch.setattr(features_, "accuracy", lambda model, data, machine: tested_on.append(data) or (0.5, 0.75))
    keep = {"tokens": 25}
    row = evaluate.row_of_samples(task, sums_of_real(task), "samples", {}, 0, keep)
    assert row["classifier names the class"] == 1
    assert row["classifier names the class, by class"] == dict.fromkeys(Drawn.classes, 1)
    assert (row["CAS top-1"], row["CAS top-5"]) == (0.5, 0.75) and tested_on == [task.real]
    # CAS learns from the same images under the same classes, whether they are kept or drawn anew.
    data, = trained_on
    assert len(data) == 25 and data.images.shape == (25, 3, 16, 16)
    places = np.array([24, 3, 11])
    for _ in range(2):
        images, labels = data.batch(places)
        assert labels.tolist() == [4, 3, 1] and torch.equal(images, shades(labels) // 20 * 20)
        data.images = None
    # Classes come in turn, each as often as another or once more; every batch has a generator of its own.
    seeds = []
    monkeypatch.setattr(task.machine, "generator", seeds.append)
    batches = list(evaluate.sampled_images(task, [0, 1, 3], {}, 7))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [*(i % 10 for i in range(16)), 4]
    assert seeds == [runtime.step_seed(7, b) for b in (0, 1, 3)]


def test_table_1(task, monkeypatch, tmp_path):
    """By hand. The training images show the last class where their label says the first, and so on."""
    monkeypatch.setattr(features_, "train_classifier", lambda data, *_: data)
    monkeypatch.setattr(features_, "accuracy", lambda data, *_: (len(data), 0))
    monkeypatch.setattr(evaluate, "token_sums", lambda task, tokens, labels, seed: {
        "nll": torch.arange(7.) * len(tokens), "seeds": torch.tensor([seed]).double(), "by_ratio": torch.ones(2, 3)})
    task.train, task.folder = Drawn(), tmp_path
    task.train.batch = lambda indices, draws=None: (shades(torch.as_tensor(9 - indices // 20)),
                                                    torch.as_tensor(indices // 20))
    real = task.ledger.add_up("real", 25, task.real.read, functools.partial(evaluate.sums_of_stages, task),
                              evaluate.FEATURES)
    assert real["seeds"].item() == sum(float(runtime.step_seed(0, b)) for b in range(4))
    found = evaluate.table1(task, real)
    rows, stages = found["rows"], found["stages"]
    assert {name: row["classifier names the class"] for name, row in rows.items()} == {
        "samples": 1, "real training images": 0, "reconstructions": 1}
    assert all(rows[name]["CAS top-1"] == 25 for name in ("samples", "real training images"))

    images = torch.cat([batch.images for batch in task.real.read(range(4))])
    restored, x = images // 20 * 20, ByShade().features(images / 255).double()
    y = ByShade().features(restored / 255).double()
    assert rows["reconstructions"]["FCD"] == pytest.approx(plain_frechet(x, y), rel=1e-6)
    psnr = -10 * ((images - restored) / 255).square().mean((1, 2, 3)).log10()
    assert stages["PSNR, dB"] == pytest.approx(psnr.mean().item(), rel=1e-6)
    shares = np.bincount(task.real.indices // 20) / 25
    assert stages["codebook usage"] == np.mean(shares > 0)
    assert stages["codebook perplexity"] == pytest.approx(np.prod(np.power(shares, -shares)))
    assert stages["NLL"] == dict(zip(SCHEDULES, range(7)))
    # 2 of 4 tokens masked in one image, half of them predicted right; then 8 of 8, in two images.
    real["by_ratio"] = torch.tensor([[1., 2, 1], [0, 0, 0], [3, 8, 2]])
    assert evaluate.figures_of_stages(task, real)["accuracy by mask ratio"] == [[0.5, 0.5], [1, 0.375]]


def test_table_2_repaints_the_right_half_and_the_centre(task, monkeypatch):
    """In 4 x 4 tokens; what is drawn is the flat shade of the true class, what stays has its noise."""
    task.real, task.transformer.config.num_tokens = Subset(Drawn(32), np.arange(0, 200, 9), 8), 16
    task.machine.leads = False                                                                # nothing is printed
    unknown, seeds = [], []

    def watched(model, labels, known, **options):
        unknown.append(known == model.mask_id)
        return obedient(model, labels, known, **options)
    monkeypatch.setattr(evaluate, "decode", watched)
    monkeypatch.setattr(evaluate, "row_of", lambda task, real, name, count, read: list(read([0, 1, 2])))
    monkeypatch.setattr(task.machine, "generator", seeds.append)
    rows, images = evaluate.table2(task, None), torch.cat([batch.images for batch in task.real.read([0, 1, 2])])
    right, centre = torch.zeros(2, 4, 4, dtype=torch.bool)
    right[:, 2:], centre[1:3, 1:3] = True, True
    assert list(rows) == ["outpainting, right 50%", "inpainting, centre 50% x 50%"]
    assert seeds == [runtime.step_seed(0, b) for b in range(3)] * 2
    for batches, region in zip(rows.values(), (right, centre)):
        assert torch.cat([batch.labels for batch in batches]).tolist() == (task.real.indices // 20).tolist()
        assert (torch.cat(unknown[:3]) == region.flatten()).all()
        expected = torch.where(evaluate.to_pixels(region, 8), images // 20 * 20, images)
        assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
        del unknown[:3]


def test_table_3_takes_each_schedule_at_its_best(task, monkeypatch, tmp_path, capsys):
    def row(task, real, what, options, seed):                # the schedules are best at T = 1, 2, 3, 1, 2, 3, 1
        place = SCHEDULES.index(options["schedule"])
        return {"FCD": 10 - place + (options["steps"] - 1 - place % 3) ** 2 + seed / 10, "IS(classifier)": seed + place}
    monkeypatch.setattr(evaluate, "row_of_samples", row)
    monkeypatch.setattr(evaluate, "figures_of_stages", lambda task, real: {"NLL": dict(zip(SCHEDULES, range(7)))})
    task.args.ablate_steps, task.folder, task.options = [3, 1, 2, 5], tmp_path, {"schedule": "cosine", "steps": 2}
    rows = evaluate.table3(task, None)
    assert list(rows) == SCHEDULES[::-1] and [rows[name]["T"] for name in SCHEDULES] == [1, 2, 3, 1, 2, 3, 1]
    for place, name in enumerate(SCHEDULES):                 # seeds 0 and 1
        assert rows[name]["NLL"] == place and rows[name]["IS(classifier)"] == place + 0.5
        assert rows[name]["FCD"] == pytest.approx(10 - place + 0.05)
        assert rows[name]["± over seeds"] == pytest.approx(0.1 / 2 ** 0.5)
    assert "11.05 ± 0.071" in capsys.readouterr().out and (tmp_path / "eval.ablation.png").exists()

    task.args.sweep = "steps"
    monkeypatch.setitem(evaluate.SWEEPS, "steps", [1, 2])
    rows = evaluate.sweep(task, None)
    assert {value: row["FCD"] for value, row in rows.items()} == pytest.approx({"1": 10.05, "2": 11.05})
    assert (tmp_path / "eval.steps.png").exists()


# ---- the whole evaluation

def test_the_row_of_a_run(folder, capsys):
    output = run("evaluate.py", "--run", folder, *QUICK, "--top-k", 5)
    found = json.loads((folder / "eval.json").read_text())
    assert "FCD" in output and "FID" not in output and "30 generated and 30 real" in output and "seed 0" in output
    rows = found["rows"]
    columns = {"CAS top-1", "CAS top-5", "precision", "recall", "FCD"}
    assert columns <= rows["samples"].keys() & rows["real training images"].keys()
    assert len(found["stages"]["NLL"]) == 7 and (folder / "eval.accuracy.png").exists()
    assert found["setup"]["torch"] == torch.__version__ and found["setup"]["generated images"] == 30

    # The same figures by hand, from the images themselves.
    machine, (tokenizer, transformer, val) = runtime.Machine("cpu"), load(folder)
    own = load_classifier(folder / "classifier.pt", evaluate.open_data("shapes", 32)[0], 3, machine)
    labels, images = torch.arange(30) % 10, []
    for b in range(3):
        g = machine.generator(runtime.step_seed(0, b) % (1 << 32))
        tokens = decode(transformer, labels[:10], steps=8, top_k=5, generator=g)
        images.append(pictures.to_uint8(tokenizer.decode(as_grid(tokens))))
    real, _ = val.batch(fair_choice(val, 30))
    x, y = (own.features(machine.to_floats(z)).double() for z in (torch.cat(images), real))
    rows = rows["samples"]
    assert rows["FCD"] == pytest.approx(plain_frechet(x, y), rel=1e-6)
    assert (rows["precision"], rows["recall"]) == metrics.precision_recall(x, y)
    named = (own.out(x.float()).argmax(1) == labels).double().mean().item()
    assert rows["classifier names the class"] == pytest.approx(named)
    tokens = tokenizer.encode(real / 255)
    codes = np.bincount(tokens.flatten().numpy(), minlength=32) / tokens.numel()
    assert found["stages"]["codebook perplexity"] == pytest.approx(np.prod(np.power(codes, -codes)))
    psnr = [-10 * np.log10(((tokenizer.decode(t[None]) - z / 255) ** 2).mean().item()) for t, z in zip(tokens, real)]
    assert found["stages"]["PSNR, dB"] == pytest.approx(np.mean(psnr), rel=1e-5)

    # What is known is not done again; another setting is.
    before = (folder / "eval.json").read_bytes()
    evaluated(folder, "--top-k", 5)
    again = capsys.readouterr().out
    assert "left" not in again and again.partition("\n\n")[2] == output.partition("\n\n")[2] != ""
    assert (folder / "eval.json").read_bytes() == before
    evaluated(folder, "--top-k", 4, "--again")
    records = json.loads((folder / "eval.json").read_text())["records"]
    assert len(records) == 3                                                      # the row of --top-k 5 is still there


def test_likelihood_and_accuracy_of_tokens():
    """By hand for a model that always predicts the same."""
    bias = torch.randn(8, generator=torch.Generator().manual_seed(0))

    class Constant(torch.nn.Module):
        mask_id, config = 11, SimpleNamespace(causal=False, num_tokens=16)

        def forward(self, tokens, labels):
            return bias.expand(*tokens.shape, 8)
    model, causal = Constant(), Constant()
    causal.config = SimpleNamespace(causal=True, num_tokens=16)
    task = SimpleNamespace(machine=runtime.Machine("cpu"), transformer=model,
                           likelihoods=dict.fromkeys(SCHEDULES, model) | {"next token": causal})
    tokens, zeros = torch.randint(0, 3, (400, 16), generator=torch.Generator().manual_seed(1)), torch.zeros(400).long()
    sums = evaluate.token_sums(task, tokens, zeros, 0)
    same = evaluate.token_sums(task, torch.zeros_like(tokens), zeros, 0)
    assert np.allclose(same["nll"] / 400, -bias.log_softmax(0)[0]) and len(same["nll"]) == 8
    exact = F.cross_entropy(bias.expand(6400, 8), tokens.flatten()).item()     # of all tokens: no schedule masks
    assert sums["nll"][7].item() / 400 == pytest.approx(exact)
    right, count, images = sums["by_ratio"].T
    edges = 16 * torch.arange(21) / 20
    assert images.sum() == 7 * 400
    assert (count <= images * edges[1:]).all() and (count > images * edges[:-1])[images > 0].all()
    expected = (tokens == bias.argmax()).double().mean().item()
    assert (right.sum() / count.sum()).item() == pytest.approx(expected, abs=0.01)


def test_an_interrupted_evaluation_goes_on(folder, monkeypatch):
    whole = evaluated(shutil.copytree(folder, folder.with_name("whole")))
    monkeypatch.setattr(Ledger, "SAVE_SECONDS", 0)
    real, calls = runtime.step_seed, []

    def interrupted(*numbers):                       # every batch is given a seed of its own, once
        calls.append(numbers)
        if len(calls) in (2, 7):                     # in the second batch of real images, then in the last of samples
            raise KeyboardInterrupt
        return real(*numbers)
    monkeypatch.setattr(runtime, "step_seed", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluated(folder)
    found = evaluated(folder)
    assert len(calls) == 3 + 3 + 2                   # every batch once, but for the two that were cut off
    assert_same(whole["rows"], found["rows"])
    assert_same(whole["stages"], found["stages"])


def evaluated_by_a_rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    Ledger.SAVE_SECONDS = 0                          # the ranks' sums are added up after every round
    args = evaluate.parse_flags(["--run", str(folder), *QUICK, "--device", "cpu", "--bf16", "no"])
    runtime.launch(evaluate.evaluate, args)


def test_two_ranks_give_the_figures_of_one(folder):
    """Three batches: in the last round the second rank has none."""
    alone = evaluated(shutil.copytree(folder, folder.with_name("alone")))
    torch.multiprocessing.spawn(evaluated_by_a_rank, (folder, 27000 + os.getpid() % 1000), nprocs=2)
    found = json.loads((folder / "eval.json").read_text())
    assert_same(alone["rows"], found["rows"], 1e-8)
    assert_same(alone["stages"], found["stages"], 1e-8)


def test_ablation_sweep_and_manipulation(folder):
    found = evaluated(folder, "--ablate", "--ablate-steps", 2, 3, 500, "--seeds", 2, "--sweep", "order", "--manipulate",
                      "--num", 10)
    rows = found["ablation"]
    assert sorted(rows) == sorted(SCHEDULES) and all(row["T"] in (2, 3) for row in rows.values())
    assert [row["FCD"] for row in rows.values()] == sorted(row["FCD"] for row in rows.values())
    record = {record["condition"]: record["result"] for record in found["records"]}
    distances = [[result["FCD"] for name, result in record.items() if f"steps={T} schedule=cosine" in name]
                 for T in (2, 3)]
    best = min(distances, key=np.mean)
    assert len(best) == 2 and rows["cosine"]["FCD"] == pytest.approx(np.mean(best))
    assert rows["cosine"]["± over seeds"] == pytest.approx(np.std(best, ddof=1))
    assert list(found["sweep"]) == ["confidence", "random", "halton"] and len(found["manipulation"]) == 2
    assert (folder / "eval.ablation.png").exists() and (folder / "eval.order.png").exists()


def test_what_is_not_repainted_stays(trained, monkeypatch):
    known, labels = [], []

    def watched(model, given, **options):
        known.append(options["known"])
        labels.append(given)
        return decode(model, given, **options)
    monkeypatch.setattr(evaluate, "decode", watched)
    tokenizer, transformer, val = load(trained)
    task = SimpleNamespace(args=SimpleNamespace(seed=0), machine=runtime.Machine("cpu"), tokenizer=tokenizer,
                           transformer=transformer, options={"steps": 2}, real=Subset(val, np.arange(6), 4))
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6, 3:] = True
    batches = list(evaluate.repainted_images(task, [0, 1], region))
    assert len(batches) == 2
    images, true_labels = val.batch(np.arange(6))
    masked = torch.where(region, transformer.mask_id, tokenizer.encode(images / 255))
    assert torch.equal(torch.cat(known), masked.flatten(1)) and torch.equal(torch.cat(labels), true_labels)
    same = (torch.cat([batch.images for batch in batches]) == images).all(0).all(0)
    assert same[:8].all() and same[24:].all() and same[:, :12].all() and not same[8:24, 12:].any()


def test_an_autoregressive_run(folder):
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--decoder", "autoregressive")
    found = evaluated(folder, "--decoder", "autoregressive", "--num", 10)
    tokenizer, transformer, val = load(folder, "autoregressive")
    real, labels = val.batch(fair_choice(val, 10))
    tokens = tokenizer.encode(real / 255).flatten(1)
    expected = F.cross_entropy(transformer(tokens, labels).flatten(0, 1), tokens.flatten()).item()
    assert found["stages"]["NLL"] == {"next token": pytest.approx(expected, rel=1e-5)}
    assert found["rows"]["samples"]["FCD"] > 0
    beside = evaluated(folder, "--num", 10)["stages"]["NLL"]                        # in the parallel decoder's table
    assert list(beside) == [*SCHEDULES, "next token"] and beside["next token"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="--decoder parallel"):
        evaluated(folder, "--decoder", "autoregressive", "--ablate")


# ---- Inception, bad input

def inception_weights(path):
    """Untrained weights of torch-fidelity's Inception, under which signals neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    class Untrained(Inception):
        def load_state_dict(self, state):
            pass
    torch.save({}, path)
    weights = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=path).state_dict()
    for weight in weights.values():
        if weight.ndim > 1:
            deviation = (2 / weight[0].numel()) ** 0.5
            torch.nn.init.normal_(weight, 0, deviation, generator=torch.Generator().manual_seed(0))
    weights["fc.weight"] *= 300                                                     # classes that differ
    torch.save(weights, path)


def test_features_as_torch_fidelity_measures_them(tmp_path):
    fidelity, sets = pytest.importorskip("torch_fidelity"), []
    inception_weights(tmp_path / "inception.pth")
    g, machine = np.random.default_rng(0), runtime.Machine("cpu")
    for name, shade in (("a", 100), ("b", 110)):
        (tmp_path / name).mkdir()
        blocks = g.integers(0, 2 * shade, (12, 4, 4, 3)).repeat(10, 1).repeat(10, 2).astype(np.uint8)
        for i, pixels in enumerate(blocks):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        images = torch.from_numpy(blocks[np.array(sorted(range(12), key=str))]).movedim(-1, 1)    # as files are sorted
        columns = (metrics.split_of(12), images, torch.zeros(12).long())
        sets.append([Batch(i, *part) for i, part in enumerate(zip(*(column.split(5) for column in columns)))])
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, prc=True, cuda=False,
        feature_extractor="inception-v3-compat", cache=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"))
    inception = features_.load_inception(str(tmp_path / "inception.pth"), machine)
    features = features_.Features(machine, ("any",), None, inception, sets[1][0].images)
    book, sums = Ledger(None, None, machine, 5), []
    for name, batches in zip("ab", sets):
        sums.append(book.add_up(name, 12, lambda numbers, batches=batches: batches, features.sums, {"features": 12}))
    ours = features.figures(*sums)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3) and ours["FID"] > 1e-4
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["± over splits"] == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-5)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)
    assert theirs["inception_score_mean"] > 1.01 and 0 < min(theirs["precision"], theirs["recall"]) < 1
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights"):
        features_.load_inception(str(tmp_path / "other.pth"), machine)


@pytest.mark.parametrize("flags, says", [
    (["--num", 3], "--num 3: .* at least 4"),
    (["--steps", 65], "steps must be from 1"),
    (["--sweep", "cfg"], "--class-dropout"),
    (["--ablate", "--ablate-steps", 99], "--ablate-steps"),
    (["--decoder", "autoregressive"], "autoregressive.pt does not exist"),
    (["--classifier-steps", 0], "--features inception"),
    (["--features", "inception", "--inception", "nowhere.pth"],
     "pip install torch-fidelity|nowhere.pth does not exist"),
])
def test_bad_input(folder, flags, says):
    with pytest.raises((ValueError, OSError), match=says):
        evaluated(folder, *flags)
    assert not (folder / "eval.json").exists()


@pytest.mark.parametrize("flags", [("--batch", "0"), ("--seeds", "0"), ("--ablate-steps", "0"), ("--num", "-1"),
                                   ("--schedule", "quartic"), ("--order", "spiral")])
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse_flags(list(flags))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and flags[0] in last and flags[1] in last
