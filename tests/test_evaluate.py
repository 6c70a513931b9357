"""evaluate.py: each measure against the same by hand, then the whole on a small run of random weights."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_ranks, rand_of
from PIL import Image
from test_metrics import frechet_by_singular_values, inception_score_in_numpy

import evaluate
import measure
import sample
from lib import features, metrics, pictures, runtime, sets
from lib.errors import UserError
from lib.features import Classifier, Measurements, Networks, Reference
from lib.files import fingerprint, load_checkpoint, load_weights, save_checkpoint
from lib.judge import Judge
from lib.loader import training_batches
from lib.results import Results
from lib.sampling import rand_of_images
from lib.shapes import Shapes
from maskgit import SCHEDULES, MaskGIT, MaskGITConfig, decode
from sequential import CausalTransformer
from vqgan import VQGAN, VQGANConfig, as_grid, to_pixels

QUICK = ["--num", "30", "--batch", "10", "--classifier-steps", "1", "--device", "cpu", "--bf16", "no"]
NAMES = list("abcdefghij")


# ---- a small run of random weights

def save_run(folder):
    """Writes the checkpoints of both stages, and returns the tokenizer and the transformer."""
    torch.manual_seed(0)
    tokenizer = VQGAN(VQGANConfig(32, 4, filters=8, multipliers=(1, 1, 1), res_blocks=1, groups=1)).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codebook)
    save_checkpoint(folder / "vqgan.pt", {
        "kind": "vqgan", "config": asdict(tokenizer.config), "model": tokenizer.state_dict(),
        "image_size": 32, "data": "shapes", "classes": Shapes.classes})
    transformer = save_transformer(folder, "transformer", MaskGIT, fingerprint(tokenizer))
    return tokenizer, transformer


def save_transformer(folder, kind, model_class, tokenizer, data="shapes", classes=None, side=8):
    model = model_class(MaskGITConfig(32, 10, side ** 2, dim=16, depth=1, heads=2, mlp_dim=32)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)                   # so that predictions depend on what is seen
    save_checkpoint(folder / f"{kind}.pt", {
        "kind": kind, "config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer,
        "image_size": 4 * side, "data": data, "classes": classes or Shapes.classes})
    return model


DRAW_ACCURACY = pictures.draw_accuracy


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """Spares evaluations the picture at their end, and trains classifiers on 16 images a step instead of 128."""
    monkeypatch.setattr(pictures, "draw_accuracy", lambda path, points: None)
    monkeypatch.setattr(features, "training_batches", lambda data, batch, *others: training_batches(data, 16, *others))


@pytest.fixture
def folder(tmp_path):
    """The folder of such a run."""
    save_run(tmp_path / "shapes")
    return tmp_path / "shapes"


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    """A classifier of the shapes, after the one step of QUICK."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    features.load_classifier(path, Shapes("train"), 1, runtime.Machine("cpu"))
    return path


@pytest.fixture
def opened(folder, classifier_file):
    """What evaluate.py opens of it: an Evaluation."""
    shutil.copy(classifier_file, folder)
    shutil.copy(classifier_file, folder / "classifier.1.pt")
    return measure.open_evaluation(flags_of(folder), runtime.Machine("cpu"))


def flags_of(folder, *more):
    return evaluate.parse_flags(["--run", str(folder), *QUICK, *map(str, more)])


def evaluated(folder, *more):
    """Runs evaluate.py in this process -> what it wrote to eval.json."""
    evaluate.evaluate(flags_of(folder, *more), runtime.Machine("cpu"))
    return json.loads((folder / "eval.json").read_text())


def real_images(count):
    """Validation images as evaluate.py chooses them: images, labels."""
    data = Shapes("val")
    order = np.random.Generator(np.random.Philox(key=[2020, 0])).permutation(len(data))[:count]
    return data.batch(order)


def approximately(value, tolerance):
    """pytest.approx of nested dicts and lists."""
    if isinstance(value, dict):
        return {name: approximately(item, tolerance) for name, item in value.items()}
    if isinstance(value, list):
        return [approximately(item, tolerance) for item in value]
    return pytest.approx(value, rel=tolerance) if isinstance(value, float) else value


# ---- lib/sets.py

def test_the_classes_take_turns():
    batches = [sets.samples_in_turn(number, 4, 14, 5) for number in range(4)]
    assert [labels.tolist() for labels, _ in batches] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1], [2, 3]]
    assert [numbers.tolist() for _, numbers in batches] == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 2, 2], [2, 2]]


def test_a_random_subset_is_the_same_each_time_and_of_all_classes():
    data = Shapes("val")
    subset = sets.random_subset(data, 90)
    assert len(subset) == len(set(subset.indices)) == 90
    assert (subset.indices == sets.random_subset(data, 90).indices).all()
    images, labels = subset.batch(np.array([5, 2]))
    expected, expected_labels = data.batch(subset.indices[[5, 2]])
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    batches = list(sets.read_batches(subset, 40, range(1, 3)))
    assert [batch.number for batch in batches] == [1, 2] and [len(batch.images) for batch in batches] == [40, 10]
    assert torch.equal(batches[1].labels, subset.batch(np.arange(80, 90))[1])
    kept = sets.InMemory(subset)
    assert len(kept) == 90 and torch.equal(kept.batch(np.array([5, 2]))[0], images)


def be_rank(monkeypatch, rank, world):
    monkeypatch.setattr(sets.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sets.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(sets.dist, "get_world_size", lambda: world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_batch_is_measured_by_one_rank(world, monkeypatch):
    """11 images in four batches; of five ranks one has nothing to do."""
    shares = []
    for rank in range(world):
        be_rank(monkeypatch, rank, world)
        shares.append(list(sets.batches_of_rank(11, 3)))
    assert sorted(sum(shares, [])) == [0, 1, 2, 3]

    def all_gather_object(by_rank, own):
        by_rank[:] = shares
    monkeypatch.setattr(sets.dist, "all_gather_object", all_gather_object)
    assert sets.gather_batches(shares[-1]) == [0, 1, 2, 3]


# ---- lib/results.py

def test_results_are_kept_with_their_setup(tmp_path):
    path = tmp_path / "eval.json"
    for setup, figure in ((1, 10.0), (2, 20.0)):
        results = Results(path, {"setup": setup}, writes=True)
        assert results.known == {}
        assert results.keep("x", {"FCD": figure}) == {"FCD": figure}
        results.keep("y", {"FCD": figure})
    assert Results(path, {"setup": 1}, writes=True).known == {"x": {"FCD": 10.0}, "y": {"FCD": 10.0}}
    again = Results(path, {"setup": 2}, writes=True, again=True)
    assert again.known == {}
    again.keep("x", {"FCD": 21.0})
    assert Results(path, {"setup": 1}, writes=True).known["x"] == {"FCD": 10.0}
    assert Results(path, {"setup": 2}, writes=True).known == {"x": {"FCD": 21.0}, "y": {"FCD": 20.0}}


def test_two_evaluations_of_a_run_keep_each_others_results(tmp_path, capsys):
    path = tmp_path / "eval.json"
    one = Results(path, {}, writes=True)
    other = Results(path, {}, writes=True)
    one.keep("x", {"FCD": 1.0})
    other.keep("y", {"FCD": 2.0})
    one.write({"rows": {}})
    later = Results(path, {}, writes=True)
    assert later.known == {"x": {"FCD": 1.0}, "y": {"FCD": 2.0}}
    assert one.find("x") == {"FCD": 1.0} and one.find("z") is None and capsys.readouterr().out == ""
    assert later.find("y") == {"FCD": 2.0}
    assert capsys.readouterr().out == "from eval.json: y (--again measures it anew)\n"


def test_only_the_first_rank_writes_results(tmp_path):
    other = Results(tmp_path / "eval.json", {}, writes=False)
    other.keep("x", {"FCD": 1.0})
    assert other.known == {"x": {"FCD": 1.0}} and not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("content", ["[]", "damaged", "{}", '{"records": [{"condition": "x"}]}', '{"records": 5}'])
def test_a_damaged_file_is_kept_aside(content, tmp_path, capsys):
    path = tmp_path / "eval.json"
    path.write_text(content)
    Results(path, {}, writes=False)
    assert path.read_text() == content                                                 # only the first rank renames it
    results = Results(path, {}, writes=True, again=True)
    assert "renamed eval.damaged.json" in capsys.readouterr().out
    assert (tmp_path / "eval.damaged.json").read_text() == content
    results.keep("x", {"FCD": 1.0})
    assert Results(path, {}, writes=True).known == {"x": {"FCD": 1.0}}


def test_a_damaged_file_that_cannot_be_renamed_is_named(tmp_path, monkeypatch):
    def replace(path, target):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "eval.json").write_text("damaged")
    monkeypatch.setattr("pathlib.Path.replace", replace)
    with pytest.raises(UserError, match=r"eval.json is damaged, .* renamed \(Permission denied\): delete it"):
        Results(tmp_path / "eval.json", {}, writes=True)


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read .* Is a directory"):
        Results(tmp_path, {}, writes=True)


# ---- lib/features.py

class Greys:
    """A data set of ten classes, sorted by class: an image of class c has the grey 20 c, with a little noise."""
    classes = NAMES
    workers = 0

    def __len__(self):
        return 200

    def batch(self, indices, draws=None):
        labels = torch.as_tensor(indices) // 20
        noise = torch.randint(0, 5, (len(labels), 3, 16, 16), generator=torch.Generator().manual_seed(0))
        return (labels[:, None, None, None] * 20 + noise).to(torch.uint8), labels


def test_a_batch_is_measured():
    machine = runtime.Machine("cpu")
    torch.manual_seed(0)
    classifier = Classifier(10).eval()
    images, labels = Shapes("val").batch(np.arange(50))
    measured = Networks(NAMES, classifier, None, machine).measure_batch(images, labels)
    with torch.no_grad():
        logits = classifier(images / 255)
        torch.testing.assert_close(measured.features, classifier.features(images / 255))
    torch.testing.assert_close(measured.logits, logits)
    assert torch.equal(measured.recognised, logits.argmax(1) == labels) and measured.recognised.any()
    torch.testing.assert_close(measured.sharpness, metrics.sharpness(images / 255))
    assert torch.equal(measured.labels, labels)


def test_inception_measures_and_the_classifier_recognises():
    """Where there is no classifier either, nothing is recognised."""
    machine = runtime.Machine("cpu")

    class Inception(torch.nn.Module):
        def forward(self, images):
            return images[:, 0, :4, 0].float(), images[:, 1, :5, 0].float()
    classifier = Classifier(10).eval()
    images, labels = Shapes("val").batch(np.arange(20))
    both = Networks(NAMES, classifier, Inception(), machine)
    assert (both.distance, both.score) == ("FID", "IS") and both.name.startswith("Inception's")
    assert f"the classifier's ({fingerprint(classifier)})" in both.name           # another one recognises other classes
    measured = both.measure_batch(images, labels)
    assert torch.equal(measured.features, images[:, 0, :4, 0].float())
    assert torch.equal(measured.recognised, classifier(images / 255).argmax(1) == labels)
    alone = Networks(NAMES, None, Inception(), machine)
    measured = alone.measure_batch(images, labels)
    assert not measured.recognised.any()
    assert list(Reference(alone, measured).figures(measured)) == ["FID", "IS", "± over splits", "sharpness / real"]


def random_measurements(n, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    return Measurements(torch.randn(n, 6, generator=g), torch.randn(n, 10, generator=g),
                        torch.rand(n, generator=g), labels, labels != 3)


def test_figures_of_images_beside_real_ones():
    """40 images of five of ten classes, the fourth of which is never recognised."""
    ours = random_measurements(40, 0)
    real = random_measurements(60, 1)
    networks = Networks(NAMES, Classifier(10), None, runtime.Machine("cpu"))
    reference = Reference(networks, real)
    row = reference.figures(ours)
    x = ours.features.double().numpy()
    y = real.features.double().numpy()
    assert row["FCD"] == pytest.approx(frechet_by_singular_values(x, y), rel=1e-6) == reference.distance(ours)
    score = inception_score_in_numpy(ours.logits.double().numpy())
    assert (row["IS(classifier)"], row["± over splits"]) == pytest.approx(score, rel=1e-6)
    assert row["sharpness / real"] == pytest.approx((ours.sharpness.mean() / real.sharpness.mean()).item())
    assert row["class recognised"] == 0.8
    assert row["class recognised, by class"] == {"a": 1, "b": 1, "c": 1, "d": 0, "e": 1}
    assert reference.precision_recall(ours) == metrics.precision_recall(ours.features, real.features)


def test_training_a_classifier(capsys, monkeypatch):
    monkeypatch.setattr(features, "training_batches", training_batches)
    machine = runtime.Machine("cpu")
    model = features.train_classifier(Greys(), 40, 0, machine, "classifier of greys")
    assert not model.training and "classifier of greys: 40 of 40 steps" in capsys.readouterr().out
    first, fifth = features.accuracy(model, sets.random_subset(Greys(), 90), machine)
    assert first > 0.3 and fifth > 0.75                                               # by chance: 0.1 and 0.5


def test_accuracy_is_of_the_first_and_of_the_first_five():
    """The right class comes first for the classes 0 to 2, fifth for 3 to 5, and sixth for the others."""
    def model(images):
        labels = (images.mean((1, 2, 3)) * 255 / 20).floor().long()
        logits = torch.zeros(len(images), 10)
        for row, label in zip(logits, labels.tolist(), strict=True):
            better = 0 if label < 3 else 4 if label < 6 else 5
            others = [other for other in range(10) if other != label]
            row[others[:better]] = 2
            row[label] = 1
        return logits
    data = sets.random_subset(Greys(), 190)
    labels = data.batch(np.arange(190))[1]
    expected = (labels < 3).double().mean().item(), (labels < 6).double().mean().item()
    assert features.accuracy(model, data, runtime.Machine("cpu")) == pytest.approx(expected)


def test_the_judge_measures_drawn_images(tmp_path):
    """What is drawn here are real images of the classes that are asked for."""
    machine = runtime.Machine("cpu")
    args = SimpleNamespace(features="classifier", classifier_steps=2, inception=None, evaluate_num=230)
    judge = Judge(args, machine, Shapes("train"), Shapes("val"), tmp_path)
    labels, numbers, drawn = [], [], []

    def draw(classes, numbers_in_class):
        labels.extend(classes.tolist())
        numbers.extend(numbers_in_class.tolist())
        images, _ = Shapes("train").batch(np.arange(len(classes)) + 1000 * len(drawn))
        drawn.append(images)
        return images
    assert judge.measure != Judge(args, machine, Shapes("train"), Shapes("train"), tmp_path).measure
    found = judge.distance(draw)
    assert judge.name == "FCD" and labels == [i % 10 for i in range(230)]
    assert numbers == [i // 10 for i in range(230)]
    weights = load_checkpoint(tmp_path / "classifier.2.pt", "classifier")["model"]       # classifier.pt has the default steps
    classifier = load_weights(Classifier(10), weights, "")
    with torch.no_grad():
        x = classifier.eval().features(torch.cat(drawn) / 255).double().numpy()
        y = classifier.features(real_images(230)[0] / 255).double().numpy()
    assert found == pytest.approx(frechet_by_singular_values(x, y), rel=1e-5)
    with pytest.raises(UserError, match="at least 2 validation images, and there is 1"):
        Judge(args, machine, Shapes("train"), sets.random_subset(Shapes("val"), 1), tmp_path)


def test_a_classifier_of_other_images_is_trained_again(classifier_file, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "train_classifier", lambda *_: Classifier(10))
    machine = runtime.Machine("cpu")
    path = tmp_path / "classifier.pt"
    kept = load_checkpoint(classifier_file, "classifier")
    nameless = {name: kept[name] for name in ("kind", "classes", "steps", "model")}        # not said of which images
    others = [kept | {"signatures": 0}, kept | {"image_size": 16}, kept | {"steps": 2}, nameless]
    for checkpoint in (kept, *others):
        save_checkpoint(path, checkpoint)
        before = path.read_bytes()
        features.load_classifier(path, Shapes("train"), 1, machine)
        assert (path.read_bytes() == before) == (checkpoint is kept)
    for checkpoint, size in ((kept, 64), (nameless, 32), (kept | {"classes": NAMES}, 32)):
        save_checkpoint(path, checkpoint)
        with pytest.raises(UserError, match=f"not known to be a classifier of the run's images, of {size} pixels: delete it"):
            features.read_classifier(path, Shapes.classes, size, machine)


# ---- measure.py

def test_samples_are_drawn_for_the_classes_in_turn(opened):
    """Each is what decode() draws for it alone."""
    tokens = measure.draw_tokens(opened, flags_of(opened.folder, "--seed", 3, "--steps", 2, "--num", 25), "samples")
    expected = []
    for i in range(25):
        rand = rand_of(runtime.step_seed(3, i % 10, i // 10))
        expected.append(decode(opened.transformer, torch.tensor([i % 10]), steps=2, rand=rand))
    assert torch.equal(tokens.long(), torch.cat(expected))
    samples = measure.Samples(tokens, opened)
    images, labels = samples.batch(np.array([24, 3, 11]))
    assert len(samples) == 25 and labels.tolist() == [4, 3, 1]
    with torch.no_grad():
        restored = opened.tokenizer.decode(as_grid(tokens[[24, 3, 11]].long()))
    assert torch.equal(images, pictures.to_uint8(restored))


@pytest.mark.parametrize("accept", [1, 0.5])
def test_samples_are_the_files_of_sample_py(opened, call_main, tmp_path, accept):
    flags = ["--seed", 3, "--steps", 2, "--accept", accept]
    tokens = measure.draw_tokens(opened, flags_of(opened.folder, *flags, "--num", 25), "samples")
    images, _ = measure.Samples(tokens, opened).batch(np.arange(25))
    call_main(sample, tmp_path, "--run", opened.folder, "--files", "out", "--num", 3, "--bf16", "no", *flags)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "out" / f"{i % 10} {Shapes.classes[i % 10]}" / f"{i // 10:05}.png") as file:
            assert (np.asarray(file) == image.movedim(0, -1).numpy()).all()


def test_cas_learns_from_the_samples_and_is_tested_on_real_images(opened, monkeypatch):
    """The same images under the same classes, whether they fit into memory or are decoded anew."""
    tokens = torch.arange(30 * 64).view(30, 64) % 32
    samples = measure.Samples(tokens, opened)
    seen = []

    def train_classifier(data, steps, seed, machine, title):
        seen.append(data)
        return "the classifier"
    monkeypatch.setattr(features, "train_classifier", train_classifier)
    monkeypatch.setattr(features, "accuracy", lambda model, data, machine: (0.5, 0.75) if data is opened.real else None)
    measured = random_measurements(30, 0)._replace(features=opened.reference.real.features + 1)
    for limit in (1 << 30, 0):
        monkeypatch.setattr(evaluate, "IN_MEMORY", limit)
        row = evaluate.precision_recall_and_cas(opened, measured, samples)
        assert list(row) == ["precision", "recall", "CAS top-1", "CAS top-5"] and row["CAS top-5"] == 0.75
    places = np.array([24, 3, 11])
    for data in seen:
        images, labels = data.batch(places)
        assert labels.tolist() == [4, 3, 1] and torch.equal(images, samples.batch(places)[0])
    assert isinstance(seen[0], sets.InMemory) and seen[1] is samples


@pytest.mark.parametrize("rows, columns", [(slice(2, 6), slice(3, 8)), (slice(0, 8), slice(4, 8))])
def test_what_is_not_repainted_stays(opened, monkeypatch, rows, columns):
    known, labels = [], []

    def watched(model, given_labels, **options):
        known.append(options["known"])
        labels.append(given_labels)
        return decode(model, given_labels, **options)
    monkeypatch.setattr(measure, "decode", watched)
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[rows, columns] = True
    batches = list(measure.repainted_batches(opened, region, "repainting"))
    images, true_labels = real_images(30)
    with torch.no_grad():
        masked = torch.where(region, opened.transformer.mask_id, opened.tokenizer.encode(images / 255))
    assert [batch.number for batch in batches] == [0, 1, 2]
    assert torch.equal(torch.cat(known), masked.flatten(1)) and torch.equal(torch.cat(labels), true_labels)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), true_labels)
    changed = (torch.cat([batch.images for batch in batches]) != images).any(1).any(0)
    pixels = to_pixels(region, 4)
    assert not changed[~pixels].any() and changed[pixels].float().mean() > 0.9


def test_table_2_repaints_the_right_half_and_the_centre(opened, monkeypatch):
    regions = {}

    def row_of_repainted(run, title, region):
        regions[title] = region.int().tolist()
        return {"FCD": 1.0}
    monkeypatch.setattr(evaluate, "row_of_repainted", row_of_repainted)
    opened.transformer.config.num_tokens = 16
    assert evaluate.table2(opened) == dict.fromkeys(regions, {"FCD": 1.0})
    assert regions == {
        "outpainting, right 50%": [[0, 0, 1, 1]] * 4,
        "inpainting, centre 50% x 50%": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]}


class Constant(torch.nn.Module):
    """Stands for a transformer: it predicts the same at every place."""
    mask_id = 11

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, labels):
        return self.logits.expand(*tokens.shape, len(self.logits))


def test_a_subset_has_the_signatures_of_its_images():
    """eval.json holds them: results of other images are not reused."""
    data = SimpleNamespace(classes=[], workers=0, signatures=lambda: np.arange(5) + 10)
    assert sets.Subset(data, np.array([3, 0])).signatures().tolist() == [13, 10]


def test_likelihood_and_accuracy_of_predictions():
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 3, (400, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(400).long()
    run = SimpleNamespace(machine=runtime.Machine("cpu"), parallel=Constant(logits), sequential=Constant(logits))
    nll, right, masked = measure.measure_predictions(run, tokens, labels, 0)
    assert nll.shape == (len(SCHEDULES) + 1,) and right.shape == masked.shape == (400, 7)
    # The sequential decoder predicts every token; which ones the others do depends on the masks.
    exact = F.cross_entropy(logits.expand(6400, 8), tokens.flatten())
    assert nll[-1].item() == pytest.approx(exact.item())
    nll[:7].sub_(exact)
    assert nll[:7].abs().max() < 0.1 and (masked >= 1).all()
    share = right.sum(0) / masked.sum(0)
    assert share == pytest.approx(np.full(7, (tokens == logits.argmax()).float().mean()), abs=0.05)
    linear = masked[:, SCHEDULES.index("linear")].double().mean() / 16
    assert linear.item() == pytest.approx(0.53, abs=0.03)                            # rounded up from a mean of a half
    assert torch.equal(measure.measure_predictions(run, tokens, labels, 0)[1], right)
    assert not torch.equal(measure.measure_predictions(run, tokens, labels, 1)[2], masked)
    run.parallel = None
    nll, right, masked = measure.measure_predictions(run, tokens, labels, 0)
    assert nll.tolist() == [pytest.approx(exact.item())] and right.shape == masked.shape == (400, 0)


def test_accuracy_by_mask_ratio():
    """Of 20 tokens: one image with 2 masked (a ratio of up to 2/20), two with 19, one with 20."""
    right = torch.tensor([1, 10, 4, 5])
    masked = torch.tensor([2, 19, 19, 20])
    assert metrics.accuracy_by_mask_ratio(right, masked, 20) == [
        [0.1, 0.5], [0.95, pytest.approx(14 / 38)], [1.0, 0.25]]
    # Of 64 tokens 3 are within the first twentieth (3.2), 4 are beyond.
    points = metrics.accuracy_by_mask_ratio(torch.tensor([3, 0]), torch.tensor([3, 4]), 64)
    assert points == [[0.0469, 1.0], [0.0625, 0.0]]


# ---- the tables

@pytest.mark.parametrize("flags, left_out", [
    ([], []), (["--ablate"], ["steps", "schedule"]), (["--sweep", "cfg"], ["cfg"]),
    (["--ablate", "--sweep", "cfg"], [])])
def test_only_settings_that_were_used_are_written(opened, flags, left_out):
    opened.args = flags_of(opened.folder, "--top-k", 5, *flags)
    settings = evaluate.settings_of(opened)
    every = {"accept", "temperature", "top_k", "steps", "schedule", "choice_temperature", "cfg", "order"}
    assert settings["sampler"].keys() == every - set(left_out) and settings["sampler"]["top_k"] == 5
    assert settings.get("seeds") == (3 if flags else None)


def test_a_long_table_of_classes_says_that_it_is_cut(opened, capsys):
    row = {"FCD": 1.0, "class recognised, by class": {f"class {i}": i / 30 for i in range(30)}}
    evaluate.print_table1(opened, {"samples": row}, {"NLL": {}})
    printed = capsys.readouterr().out
    assert "the first 20 of 30" in printed and "class 19" in printed and "class 20" not in printed


def test_table_3_takes_each_schedule_at_its_best(opened, monkeypatch, capsys):
    """The schedules are best at T = 1, 2, 3, 1, 2, 3, 1; the later, the better; seeds add 0 and 0.1."""
    def row_of_samples(run, args):
        place = SCHEDULES.index(args.schedule)
        distance = 10 - place + (args.steps - 1 - place % 3) ** 2 + args.seed / 10
        return {"FCD": distance, "IS(classifier)": args.seed + place}
    seven = SCHEDULES[:7]
    monkeypatch.setattr(evaluate, "SCHEDULES", seven)
    monkeypatch.setattr(evaluate, "row_of_samples", row_of_samples)
    monkeypatch.setattr(evaluate, "validation_figures", lambda run: {"NLL": dict(zip(seven, range(7), strict=True))})
    opened.args = flags_of(opened.folder, "--ablate-steps", 3, 1, 2, 5, 500, "--seeds", 2)
    rows = evaluate.table3(opened)
    assert list(rows) == seven[::-1] and [rows[name]["T"] for name in seven] == [1, 2, 3, 1, 2, 3, 1]
    for place, name in enumerate(seven):
        assert rows[name]["NLL"] == place and rows[name]["IS(classifier)"] == place + 0.5
        assert rows[name]["FCD"] == pytest.approx(10 - place + 0.05)
        assert rows[name]["± over seeds"] == pytest.approx(0.1 / 2 ** 0.5)
    printed = capsys.readouterr().out
    assert "note: T is at most the number of tokens, 64: larger numbers of steps are left out" in printed
    assert "11.05 ± 0.071" in printed and (opened.folder / "eval.ablation.png").exists()
    assert "seeds 0 to 1; each schedule" in printed and "seed 0" not in printed


def test_a_sweep_changes_one_setting(opened, monkeypatch, capsys):
    def row_of_samples(run, args):
        assert args.steps == 2 and args.schedule == "linear"
        return {"FCD": args.choice_temperature + args.seed, "IS(classifier)": 1.0}
    monkeypatch.setattr(evaluate, "row_of_samples", row_of_samples)
    opened.args = flags_of(opened.folder, "--sweep", "choice_temperature", "--seeds", 1, "--steps", 2,
                           "--schedule", "linear", "--seed", 7)
    rows = evaluate.sweep(opened)
    assert {value: row["FCD"] for value, row in rows.items()} == {
        "0.0": 7, "1.0": 8, "2.0": 9, "4.5": 11.5, "8.0": 15, "12.0": 19}
    assert all(row["± over seeds"] == 0 for row in rows.values())
    assert "seed 7; choice_temperature" in capsys.readouterr().out
    assert (opened.folder / "eval.choice_temperature.png").exists()


# ---- the whole evaluation

def test_table_1_is_what_a_computation_by_hand_gives(folder, capsys, monkeypatch):
    """The distance, the likelihood, the codebook and so on, from the images themselves."""
    monkeypatch.setattr(pictures, "draw_accuracy", DRAW_ACCURACY)
    found = evaluated(folder, "--top-k", 5)
    output = capsys.readouterr().out
    assert "FCD" in output and "FID" not in output and "30 generated and 30 real" in output and "seed=0" in output
    tokenizer, transformer = save_run(folder)                                         # the same weights again
    machine = runtime.Machine("cpu")
    classifier = features.load_classifier(folder / "classifier.1.pt", Shapes("train"), 1, machine)
    drawn = []
    for number in range(3):
        labels = torch.arange(10)
        rand = rand_of_images(0, labels, torch.full((10,), number), machine)
        tokens = decode(transformer, labels, steps=8, top_k=5, rand=rand)
        with torch.no_grad():
            drawn.append(pictures.to_uint8(tokenizer.decode(as_grid(tokens))))
    drawn = torch.cat(drawn)
    real, _ = real_images(30)
    x, y = (classifier.features(images / 255) for images in (drawn, real))
    row = found["rows"]["samples"]
    assert row["FCD"] == pytest.approx(frechet_by_singular_values(x.double().numpy(), y.double().numpy()), rel=1e-5)
    assert (row["precision"], row["recall"]) == metrics.precision_recall(x, y)
    recognised = (classifier.out(x).argmax(1) == torch.arange(30) % 10).double().mean().item()
    assert row["class recognised"] == pytest.approx(recognised)

    stages = found["stages"]
    with torch.no_grad():
        tokens = tokenizer.encode(real / 255)
        restored = tokenizer.decode(tokens)
    shares = np.bincount(tokens.flatten().numpy(), minlength=32) / tokens.numel()
    assert stages["codebook perplexity"] == pytest.approx(np.prod(np.power(shares, -shares)))
    assert stages["codebook usage"] == np.mean(shares > 0)
    psnr = -10 * (restored - real / 255).square().mean((1, 2, 3)).log10()
    assert stages["PSNR, dB"] == pytest.approx(psnr.mean().item(), rel=1e-5)
    z = classifier.features(pictures.to_uint8(restored) / 255)
    distance = frechet_by_singular_values(z.double().numpy(), y.double().numpy())
    assert found["rows"]["reconstructions"]["FCD"] == pytest.approx(distance, rel=1e-4)
    assert list(stages["NLL"]) == SCHEDULES and (folder / "eval.accuracy.png").exists()
    assert found["setup"]["torch"] == torch.__version__ and found["setup"]["generated images"] == 30
    columns = {"FCD", "precision", "recall", "CAS top-1", "CAS top-5"}
    assert columns <= row.keys() & found["rows"]["real training images"].keys()


def test_a_tokenizer_is_measured_without_a_transformer(folder, monkeypatch, capsys):
    stages = evaluated(folder)["stages"]
    (folder / "transformer.pt").unlink()
    arguments = evaluate.parse_flags(["--tokenizer", str(folder), *QUICK])
    evaluate.evaluate(arguments, runtime.Machine("cpu"))
    assert "note: no LPIPS" in capsys.readouterr().out
    monkeypatch.setattr(measure, "load_lpips_at_hand", lambda machine: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    evaluate.evaluate(arguments, runtime.Machine("cpu"))
    alone = json.loads((folder / "eval.json").read_text())["tokenizer"]
    assert 0 < alone.pop("LPIPS") < 1 and "LPIPS" in capsys.readouterr().out
    del stages["accuracy by mask ratio"]
    assert alone == stages | {"NLL": {}}


def test_existing_results_are_reused(folder, capsys):
    first = evaluated(folder, "--top-k", 5)
    tables = capsys.readouterr().out.partition("\n\n")[2]
    before = (folder / "eval.json").read_bytes()
    evaluated(folder, "--top-k", 5)
    output = capsys.readouterr().out
    assert "left" not in output and output.partition("\n\n")[2] == tables != ""
    assert (folder / "eval.json").read_bytes() == before
    other = evaluated(folder, "--top-k", 4)
    assert len(first["records"]) == 3 and len(other["records"]) == 4                   # the row of --top-k 5 stays
    again = evaluated(folder, "--top-k", 4, "--again")
    assert "validation images: 30 of 30" in capsys.readouterr().out
    assert again["rows"] == other["rows"] and len(again["records"]) == 4


def test_an_interrupted_evaluation_keeps_its_results(folder, monkeypatch):
    whole = evaluated(shutil.copytree(folder, folder.with_name("whole")))

    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "row_of_training_images", interrupted)
        evaluated(folder)
    conditions = [record["condition"] for record in json.loads((folder / "eval.json").read_text())["records"]]
    assert [condition.split()[0] for condition in conditions] == ["validation", "samples"]
    monkeypatch.setattr(evaluate, "measure_validation_images", interrupted)         # these two are not done again
    monkeypatch.setattr(evaluate, "draw_tokens", interrupted)
    found = evaluated(folder)
    assert found["rows"] == whole["rows"] and found["stages"] == whole["stages"]


def test_ablation_sweep_and_manipulation(folder):
    found = evaluated(folder, "--ablate", "--ablate-steps", 2, 3, 500, "--seeds", 2, "--sweep", "order", "--manipulate",
                      "--num", 10)
    rows = found["ablation"]
    assert sorted(rows) == sorted(SCHEDULES) and all(row["T"] in (2, 3) for row in rows.values())
    assert [row["FCD"] for row in rows.values()] == sorted(row["FCD"] for row in rows.values())
    distances = {2: [], 3: []}
    for record in found["records"]:
        for steps in distances:
            if f"steps={steps} schedule=cosine" in record["condition"]:
                distances[steps].append(record["result"]["FCD"])
    best = min(distances.values(), key=np.mean)
    assert len(best) == 2 and rows["cosine"]["FCD"] == pytest.approx(np.mean(best))
    assert rows["cosine"]["± over seeds"] == pytest.approx(np.std(best, ddof=1))
    assert list(found["sweep"]) == ["confidence", "random", "halton"] and len(found["manipulation"]) == 2
    assert len({row["FCD"] for row in found["sweep"].values()}) == 3
    assert (folder / "eval.ablation.png").exists() and (folder / "eval.order.png").exists()


def test_a_run_with_an_autoregressive_decoder(folder):
    """Alone, and beside the parallel one."""
    tokenizer, _ = save_run(folder)
    model = save_transformer(folder, "autoregressive", CausalTransformer, fingerprint(tokenizer))
    real, labels = real_images(10)
    with torch.no_grad():
        tokens = tokenizer.encode(real / 255).flatten(1)
        expected = F.cross_entropy(model(tokens, labels).flatten(0, 1), tokens.flatten()).item()
    found = evaluated(folder, "--decoder", "autoregressive", "--num", 10)
    assert found["stages"]["NLL"] == {"next token": pytest.approx(expected, rel=1e-5)}
    assert found["rows"]["samples"]["FCD"] > 0 and found["sampler"]["top_k"] is None
    beside = evaluated(folder, "--num", 10)["stages"]["NLL"]
    assert list(beside) == [*SCHEDULES, "next token"] and beside["next token"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="--decoder parallel"):
        evaluated(folder, "--decoder", "autoregressive", "--ablate")
    with pytest.raises(ValueError, match="--steps changes nothing with an autoregressive decoder"):
        evaluated(folder, "--decoder", "autoregressive", "--steps", 8)


@pytest.mark.parametrize("name, changes", [
    ("tokenizer", {"tokenizer": "another"}), ("image size", {"side": 16}), ("classes", {"classes": NAMES})])
def test_a_sequential_decoder_that_draws_other_images_is_left_out(folder, name, changes, capsys):
    """Even one of a larger grid, which could be given the tokens of a smaller one."""
    tokenizer, _ = save_run(folder)
    save_transformer(folder, "autoregressive", CausalTransformer, **{"tokenizer": fingerprint(tokenizer)} | changes)
    assert measure.open_evaluation(flags_of(folder), runtime.Machine("cpu")).sequential is None
    assert f"was not trained with the {name} of transformer.pt" in capsys.readouterr().out


def test_a_run_of_a_folder_is_evaluated_from_anywhere(tmp_path, monkeypatch):
    """Its checkpoint holds the absolute path of the images."""
    g = np.random.default_rng(0)
    for name, brightest in (("dark", 100), ("light", 255)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(60):
            pixels = g.integers(0, brightest, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    tokenizer, _ = save_run(tmp_path / "run")
    save_transformer(tmp_path / "run", "transformer", MaskGIT, fingerprint(tokenizer), str(tmp_path / "images"),
                     ["dark", "light"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = evaluated(tmp_path / "run")
    assert set(found["rows"]["samples"]["class recognised, by class"]) == {"dark", "light"}


def evaluated_by_a_rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    features.training_batches = lambda data, batch, *others: training_batches(data, 16, *others)      # as `faster` does in the other process
    runtime.launch(evaluate.evaluate, flags_of(folder, "--manipulate"))
    os.environ["MASTER_PORT"] = str(port + 1)
    runtime.launch(evaluate.evaluate, flags_of(folder))


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(folder):
    """Three batches: the first rank has two of them."""
    alone = shutil.copytree(folder, folder.with_name("alone"))
    manipulation = evaluated(alone, "--manipulate")["manipulation"]
    alone = evaluated(alone)
    torch.multiprocessing.spawn(evaluated_by_a_rank, (folder, 27000 + os.getpid() % 1000), nprocs=2)
    found = json.loads((folder / "eval.json").read_text())
    assert found["rows"] == approximately(alone["rows"], 1e-8)
    assert found["stages"] == approximately(alone["stages"], 1e-8)
    records = {record["condition"]: record["result"] for record in found["records"]}
    for name, row in manipulation.items():
        result, = (records[condition] for condition in records if condition.startswith(name))
        assert result == approximately(row, 1e-8)


@pytest.mark.slow
def test_ctrl_c_says_that_results_are_kept(folder):
    # A shell that runs the tests in the background lets them ignore Ctrl-C, and what they start as well.
    process = subprocess.Popen([sys.executable, ROOT / "evaluate.py", "--run", folder, *QUICK, "--num", "2000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "generated and" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "kept in eval.json" in errors and "start the same command again" in errors


# ---- Inception, bad input

def inception_weights(path):
    """Untrained weights of torch-fidelity's Inception, under which signals neither vanish nor explode."""
    from torch_fidelity import feature_extractor_inceptionv3

    class Untrained(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
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


@pytest.mark.slow
def test_features_as_torch_fidelity_measures_them(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    inception_weights(tmp_path / "inception.pth")
    machine = runtime.Machine("cpu")
    networks = Networks(["any"], None, features.load_inception(str(tmp_path / "inception.pth"), machine), machine)
    g = np.random.default_rng(0)
    measured = []
    for name, shade in (("a", 100), ("b", 110)):
        (tmp_path / name).mkdir()
        blocks = g.integers(0, 2 * shade, (12, 4, 4, 3)).repeat(10, 1).repeat(10, 2).astype(np.uint8)
        for i, pixels in enumerate(blocks):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
        images = torch.from_numpy(blocks[np.array(sorted(range(12), key=str))]).movedim(-1, 1)    # as files are sorted
        batches = [sets.Batch(i, part, torch.zeros(len(part)).long()) for i, part in enumerate(images.split(5))]
        measured.append(networks.measure(batches))
    theirs = fidelity.calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, prc=True, cuda=False,
        feature_extractor="inception-v3-compat", cache=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(tmp_path / "inception.pth"))
    reference = Reference(networks, measured[1])
    ours = reference.figures(measured[0])
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3) and ours["FID"] > 1e-4
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["± over splits"] == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-5)
    expected = theirs["precision"], theirs["recall"]
    assert reference.precision_recall(measured[0]) == pytest.approx(expected, rel=1e-3) and 0 < min(expected) < 1
    assert theirs["inception_score_mean"] > 1.01
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights"):
        features.load_inception(str(tmp_path / "other.pth"), machine)


def fetch_no_inception(path):
    """On each rank, without network: loads Inception, and writes what is said to path.RANK."""
    def no_network(*arguments, **options):
        raise OSError("no network")
    package = SimpleNamespace(FeatureExtractorInceptionV3=no_network)
    sys.modules["torch_fidelity"] = SimpleNamespace(feature_extractor_inceptionv3=package)
    sys.modules["torch_fidelity.feature_extractor_inceptionv3"] = package
    machine = runtime.Machine("cpu")
    machine.wait_for_ranks()
    try:
        features.load_inception(None, machine)
    except Exception as error:
        path.with_suffix(f".{machine.rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(machine.rank)


def test_only_the_rank_that_fetches_blames_the_network(tmp_path):
    """The others have lost it, which command_line() says."""
    assert on_ranks(fetch_no_inception, tmp_path / "said") == [0, 1]
    assert "could not fetch Inception's weights (no network)" in (tmp_path / "said.0").read_text()
    assert (tmp_path / "said.1").read_text().startswith("RuntimeError")


@pytest.mark.parametrize("flags, says", [
    (["--num", 3], "--num 3 .* at least 4"),
    (["--steps", 65], "steps must be from 1"),
    (["--sweep", "cfg"], "--class-dropout"),
    (["--top-k", 33], "--top-k 33 is more"),
    (["--ablate", "--ablate-steps", 99], "--ablate-steps"),
    (["--decoder", "autoregressive"], "autoregressive.pt does not exist"),
    (["--classifier-steps", 0], "--features inception"),
    (["--tokenizer", ROOT / "example"], "--run changes nothing with --tokenizer"),
    (["--ablate-steps", 4], "--ablate-steps changes nothing without --ablate"),
    (["--seeds", 5], "--seeds changes nothing without --ablate or --sweep"),
    (["--ablate", "--schedule", "cosine"], "--schedule changes nothing where --ablate"),
    (["--sweep", "temperature", "--temperature", 0.9], "--temperature changes nothing where .* --sweep"),
    (["--sweep", "choice_temperature", "--order", "random"], "changes nothing with --order random: leave out --order"),
    (["--manipulate", "--accept", 0.5], "--accept chooses among whole samples"),
    (["--accept", 0.5, "--classifier-steps", 0, "--features", "inception"], "leave out --classifier-steps 0"),
    (["--inception", "file.pth"], "add --features inception"),
    (["--features", "inception", "--inception", "nowhere.pth"],
     "pip install torch-fidelity|nowhere.pth does not exist"),
])
def test_bad_input(folder, flags, says):
    with pytest.raises((ValueError, OSError), match=says):
        evaluated(folder, *flags)
    assert not (folder / "eval.json").exists() and not list(folder.glob("classifier*"))


def test_other_classes_than_the_runs(folder):
    tokenizer, _ = save_run(folder)
    save_transformer(folder, "transformer", MaskGIT, fingerprint(tokenizer), classes=NAMES)
    with pytest.raises(ValueError, match="the 10 classes of shapes are not those"):
        evaluated(folder)


def test_images_that_are_not_there(folder):
    """Older checkpoints hold the path as it was typed."""
    tokenizer, _ = save_run(folder)
    save_transformer(folder, "transformer", MaskGIT, fingerprint(tokenizer), data="my/images")
    with pytest.raises(ValueError, match="my/images, the images that .* was trained on, is not there: put it there, or"):
        evaluated(folder)
    save_transformer(folder, "transformer", MaskGIT, fingerprint(tokenizer), data="/my/images")
    with pytest.raises(ValueError, match="is not there: put it there$"):
        evaluated(folder)


def test_too_few_training_images(folder, monkeypatch):
    monkeypatch.setattr(measure, "open_data", lambda *_: (sets.random_subset(Shapes("train"), 3), Shapes("val")))
    with pytest.raises(UserError, match="shapes has 3 training images, and at least 4"):
        evaluated(folder)


@pytest.mark.parametrize("flag, value", [
    ("accept", 0.5), ("order", "random"), ("temperature", 1), ("decoder", "parallel")])
def test_flags_that_change_nothing_for_a_tokenizer(folder, flag, value):
    arguments = evaluate.parse_flags(["--tokenizer", str(folder), f"--{flag}", str(value), *QUICK])
    with pytest.raises(UserError, match=f"--{flag} changes nothing with --tokenizer"):
        evaluate.evaluate(arguments, runtime.Machine("cpu"))


@pytest.mark.parametrize("flags", [("--batch", "0"), ("--seeds", "0"), ("--ablate-steps", "0"), ("--num", "-1"),
                                   ("--schedule", "nonsense"), ("--order", "spiral")])
def test_bad_flags(flags):
    with pytest.raises(UserError, match=f"{flags[0]}: .*{flags[1]}"):
        evaluate.parse_flags(list(flags))
