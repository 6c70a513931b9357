"""evaluate.py and its metrics: against plain computations, torch-fidelity, an interruption, two ranks."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import devices
import evaluate
import metrics
import runtime
import streaming
from classifier import Chosen, load_classifier, to_floats
from conftest import TINY_TRANSFORMER, refused, run
from maskgit import decode
from sample import load_run, restore
from test_data import make_folder

QUICK = "--num 30 --batch 10 --classifier-steps 3".split()


def statistics(features):
    shift = features[:3].double().mean(0)
    return metrics.mean_and_covariance(metrics.moments(features, shift), shift)


def plain_frechet(x, y):
    """In float64 and without any matrix root: C1 = aᵀa and C2 = bᵀb, and the eigenvalues of C1 C2 are the squares of the singular
    values of a bᵀ."""
    a, b = ((z - z.mean(0)).numpy() / np.sqrt(len(z) - 1) for z in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square((x.mean(0) - y.mean(0)).numpy()).sum() + np.square(a).sum() + np.square(b).sum() - 2 * overlap


def evaluated(folder, *flags):
    """Runs evaluate.py on a run in this process -> what it wrote to eval.json."""
    evaluate.evaluate(evaluate.parse_flags(["--run", str(folder), *QUICK, *map(str, flags)]), devices.Machine("cpu"))
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

@pytest.mark.parametrize("n, m, D", [(400, 300, 20), (30, 50, 100), (30, 400, 60)])        # the last two: singular covariances
def test_frechet_distance(n, m, D):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=g).double()
    x, y = torch.randn(n, D, generator=g).double() @ mix + 100, torch.randn(m, D, generator=g).double() @ mix * 1.1 + 99
    found = metrics.frechet_distance(*statistics(x), *statistics(y))
    assert found == pytest.approx(plain_frechet(x, y), rel=1e-6)
    (mean1, c1), (mean2, c2) = ((z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    if D < min(n, m):                                                                      # as in the formula
        roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real
        assert found == pytest.approx(np.square(mean1 - mean2).sum() + np.trace(c1 + c2) - 2 * roots.sum(), rel=1e-6)
    assert metrics.frechet_distance(*statistics(x), *statistics(x)) < 1e-6 * np.trace(c1)


def test_streaming_sums_are_those_of_all_at_once():
    g = torch.Generator().manual_seed(1)
    x, logits = 1e6 + torch.randn(101, 7, generator=g).double(), 3 * torch.randn(101, 5, generator=g).double()
    split, shift, halves = metrics.split_of(101), x[:10].mean(0), [{}, {}]
    for start in range(0, 101, 10):
        part = slice(start, start + 10)
        metrics.add(halves[start > 40], metrics.moments(x[part], shift) | metrics.score_sums(logits[part], split[part]))
    sums = metrics.add(metrics.add({}, halves[1]), halves[0])
    mean, covariance = metrics.mean_and_covariance(sums, shift)
    assert np.allclose(mean, x.numpy().mean(0), rtol=1e-10, atol=0)
    assert np.abs(covariance.numpy() - np.cov(x.numpy(), rowvar=False)).max() < 1e-10 * np.abs(np.cov(x.numpy(), rowvar=False)).max()

    scores, order = [], np.random.RandomState(2020).permutation(101)
    for i in range(10):
        p = logits.softmax(1)[order[i * 101 // 10:(i + 1) * 101 // 10]].numpy()
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert np.allclose(metrics.inception_score(sums), (np.mean(scores), np.std(scores)), rtol=1e-10, atol=0)
    # All alike: 1. Each sure of a class of its own, as often: the number of classes.
    alike, apart = torch.zeros(60, 6), 1e3 * torch.eye(6).repeat(10, 1)
    for logits, score in ((alike, 1), (apart, 6)):
        assert metrics.inception_score(metrics.score_sums(logits, torch.zeros(60, dtype=torch.long)))[0] == pytest.approx(score)


@pytest.mark.parametrize("n, m, repeat", [(40, 57, False), (57, 40, True), (4, 9, False)])
def test_precision_and_recall(n, m, repeat):
    """repeat: many points coincide, so that many radii and distances are exactly 0."""
    g = np.random.default_rng(n)
    x, y, few = (1e7 + g.standard_normal((k, 6)) for k in (n, m, 12))
    if repeat:
        x, y = few[g.integers(0, 8, n)], few[g.integers(4, 12, m)]

    def near(images, others, k=3):
        squares = lambda p: ((others - p) ** 2).sum(1)
        radii = np.array([np.sort(squares(p))[k] for p in others])
        return np.mean([(squares(p) <= radii).any() for p in images])

    found = metrics.precision_recall(torch.tensor(x), torch.tensor(y), rows=7)
    assert found == (near(x, y), near(y, x)) and (n < 10 or 0 < min(found) < 1)
    with pytest.raises(ValueError, match="at least 4"):
        metrics.precision_recall(torch.tensor(x)[:3], torch.tensor(y))


# ---- the whole evaluation

def test_the_row_of_a_run(folder, capsys):
    output = run("evaluate.py", "--run", folder, *QUICK, "--top-k", 5)
    found = json.loads((folder / "eval.json").read_text())
    assert "FCD" in output and "FID" not in output and "30 generated and 30 real" in output and "seed 0" in output
    rows = found["rows"]
    assert {"CAS top-1", "CAS top-5", "precision", "recall", "FCD"} <= rows["samples"].keys() & rows["real training images"].keys()
    assert len(found["stages"]["NLL"]) == 7 and (folder / "eval.accuracy.png").exists()
    assert found["setup"]["torch"] == torch.__version__ and found["setup"]["generated images"] == 30

    # The same figures by hand, from the images themselves.
    machine = devices.Machine("cpu")
    _, tokenizer, transformer, _ = load_run(folder, "cpu")
    train, val = evaluate.open_data("shapes", 32)
    classifier = load_classifier(folder / "classifier.pt", train, 3, machine)
    labels, images = torch.arange(30) % 10, []
    for b in range(3):
        g = machine.generator(devices.step_seed(0, b) % (1 << 32))
        images.append(runtime.quantize(restore(tokenizer, decode(transformer, labels[:10], steps=8, top_k=5, generator=g))))
    real, real_labels = val.batch(evaluate.shuffled(5000)[:30])
    x, y = (classifier.features(to_floats(z, machine)).double() for z in (torch.cat(images), real))
    rows = rows["samples"]
    assert rows["FCD"] == pytest.approx(plain_frechet(x, y), rel=1e-6)
    assert (rows["precision"], rows["recall"]) == metrics.precision_recall(x, y)
    assert rows[evaluate.NAMED] == pytest.approx((classifier.out(x.float()).argmax(1) == labels).double().mean().item())
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
    assert len(json.loads((folder / "eval.json").read_text())["records"]) == 3                      # the row of --top-k 5 is still there


def test_likelihood_and_accuracy_of_tokens():
    """By hand for a model that always predicts the same."""
    bias = torch.randn(8, generator=torch.Generator().manual_seed(0))

    class Constant(torch.nn.Module):
        mask_id, config = 11, evaluate.argparse.Namespace(causal=False, num_tokens=16)

        def forward(self, tokens, labels):
            return bias.expand(*tokens.shape, 8)
    task = streaming.Task(devices.Machine("cpu"), None, "FCD", "IS", 10, transformer=Constant())
    tokens = torch.randint(0, 3, (400, 16), generator=torch.Generator().manual_seed(1))
    sums = streaming.token_sums(task, tokens, torch.zeros(400, dtype=torch.long), 0)
    same = streaming.token_sums(task, torch.zeros(400, 16, dtype=torch.long), torch.zeros(400, dtype=torch.long), 0)
    assert np.allclose(same["nll"] / 400, -bias.log_softmax(0)[0]) and len(same["nll"]) == 7
    right, count, images = sums["by_ratio"].T
    edges = 16 * torch.arange(21) / 20
    assert images.sum() == 7 * 400 and (count <= images * edges[1:]).all() and (count > images * edges[:-1])[images > 0].all()
    assert (right.sum() / count.sum()).item() == pytest.approx((tokens == bias.argmax()).double().mean().item(), abs=0.01)


def test_an_interrupted_evaluation_goes_on(folder, monkeypatch):
    whole = evaluated(shutil.copytree(folder, folder.with_name("whole")))
    monkeypatch.setattr(streaming.Ledger, "SAVE_SECONDS", 0)
    real, calls = streaming.restore, []

    def interrupted(tokenizer, tokens):
        calls.append(len(tokens))
        if len(calls) in (2, 7):                     # in the second batch of real images, then in the last of samples
            raise KeyboardInterrupt
        return real(tokenizer, tokens)
    monkeypatch.setattr(streaming, "restore", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluated(folder)
    found = evaluated(folder)
    assert len(calls) == 3 + 3 + 2                   # every batch once, but for the two that were cut off
    assert_same(whole["rows"], found["rows"])
    assert_same(whole["stages"], found["stages"])


def evaluated_by_a_rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    streaming.Ledger.SAVE_SECONDS = 0                # the ranks' sums are added up after every round
    evaluated(folder)


def test_two_ranks_give_the_figures_of_one(folder):
    """Three batches: in the last round the second rank has none."""
    alone = evaluated(shutil.copytree(folder, folder.with_name("alone")))
    torch.multiprocessing.spawn(evaluated_by_a_rank, (folder, 27000 + os.getpid() % 1000), nprocs=2)
    found = json.loads((folder / "eval.json").read_text())
    assert_same(alone["rows"], found["rows"], 1e-8)
    assert_same(alone["stages"], found["stages"], 1e-8)


def test_ablation_sweep_and_manipulation(folder):
    found = evaluated(folder, "--ablate", "--ablate-steps", 2, 3, 500, "--seeds", 2, "--sweep", "order", "--manipulate", "--num", 10)
    rows = found["ablation"]
    assert sorted(rows) == sorted(streaming.SCHEDULES) and all(row["T"] in (2, 3) for row in rows.values())
    assert [row["FCD"] for row in rows.values()] == sorted(row["FCD"] for row in rows.values())
    record = {record["condition"]: record["result"] for record in found["records"]}
    distances = [[result["FCD"] for name, result in record.items() if f"steps={T} schedule=cosine" in name] for T in (2, 3)]
    best = min(distances, key=np.mean)
    assert len(best) == 2 and rows["cosine"]["FCD"] == pytest.approx(np.mean(best))
    assert rows["cosine"]["± over seeds"] == pytest.approx(np.std(best, ddof=1))
    assert list(found["sweep"]) == ["confidence", "random", "halton"] and len(found["manipulation"]) == 2
    assert (folder / "eval.ablation.png").exists() and (folder / "eval.order.png").exists()


def test_what_is_not_repainted_stays(trained, monkeypatch):
    machine, seen, known = devices.Machine("cpu"), [], []
    monkeypatch.setattr(streaming, "decode", lambda *args, **options: known.append(options["known"]) or decode(*args, **options))
    _, tokenizer, transformer, _ = load_run(trained, "cpu")
    _, val = evaluate.open_data("shapes", 32)

    def extract(images):
        seen.append(images)
        return images.flatten(1).float(), torch.zeros(len(images), 10)
    task = streaming.Task(machine, extract, "FCD", "IS", 4, shift=torch.zeros(3072), tokenizer=tokenizer, transformer=transformer,
                          real=Chosen(val, np.arange(6), 4))
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6, 3:] = True
    assert len(list(streaming.repainted(task, region, {"steps": 2})([0, 1]))) == 2
    images = val.batch(np.arange(6))[0]
    masked = torch.where(region, transformer.mask_id, tokenizer.encode(images / 255))
    assert torch.equal(torch.cat(known), masked.flatten(1))
    same = (torch.cat(seen) == images).all(0).all(0)
    assert same[:8].all() and same[24:].all() and same[:, :12].all() and not same[8:24, 12:].any()


def test_an_autoregressive_run(folder):
    run("train_transformer.py", "--run", folder, *TINY_TRANSFORMER, "--decoder", "autoregressive")
    found = evaluated(folder, "--decoder", "autoregressive", "--num", 10)
    _, tokenizer, transformer, _ = load_run(folder, "cpu", decoder="autoregressive")
    real, labels = evaluate.open_data("shapes", 32)[1].batch(evaluate.shuffled(5000)[:10])
    tokens = tokenizer.encode(real / 255).flatten(1)
    expected = F.cross_entropy(transformer(tokens, labels).flatten(0, 1), tokens.flatten()).item()
    assert found["stages"]["NLL"] == {"next token": pytest.approx(expected, rel=1e-5)} and found["rows"]["samples"]["FCD"] > 0
    with pytest.raises(ValueError, match="--decoder parallel"):
        evaluated(folder, "--decoder", "autoregressive", "--ablate")


# ---- folders of images, Inception, bad input

def test_two_folders_as_torch_fidelity_measures_them(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    class Untrained(Inception):
        def load_state_dict(self, state):
            pass
    torch.save({}, tmp_path / "inception.pth")
    weights = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "inception.pth").state_dict()
    for name, weight in weights.items():                                            # so that signals neither vanish nor explode
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, (2 / weight[0].numel()) ** 0.5, generator=torch.Generator().manual_seed(0))
    weights["fc.weight"] *= 300                                                     # classes that differ
    torch.save(weights, tmp_path / "inception.pth")
    g = np.random.default_rng(0)
    for name, shade in (("a", 100), ("b", 110)):
        (tmp_path / name).mkdir()
        for i in range(12):
            blocks = g.integers(0, 2 * shade, (4, 4, 3)).repeat(10, 0).repeat(10, 1)
            Image.fromarray(blocks.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    theirs = fidelity.calculate_metrics(input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), fid=True, isc=True, prc=True, cuda=False,
                                        feature_extractor="inception-v3-compat", cache=False, verbose=False, save_cpu_ram=True,
                                        feature_extractor_weights_path=str(tmp_path / "inception.pth"))
    flags = ["--folders", str(tmp_path / "a"), str(tmp_path / "b"), "--features", "inception", "--batch", "5"]
    ours = evaluate.evaluate(evaluate.parse_flags([*flags, "--inception", str(tmp_path / "inception.pth")]), devices.Machine("cpu"))
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3) and ours["FID"] > 1e-4
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["± over splits"] == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-5)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)
    assert theirs['inception_score_mean'] > 1.01 and 0 < min(theirs['precision'], theirs['recall']) < 1
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights"):
        evaluate.evaluate(evaluate.parse_flags([*flags, "--inception", str(tmp_path / "other.pth")]), devices.Machine("cpu"))


def test_two_folders_by_the_classifier_of_a_run(folder, tmp_path):
    for name in "ab":
        make_folder(tmp_path / name, {"x": 5}, size=(32, 32))
    flags = ["--folders", str(tmp_path / "a"), str(tmp_path / "b")]
    found = evaluate.evaluate(evaluate.parse_flags([*flags, "--run", str(folder), *QUICK]), devices.Machine("cpu"))
    assert found["FCD"] < 1e-6 and found["precision"] == found["recall"] == 1
    make_folder(tmp_path / "b", {"y": 1}, size=(40, 32))
    make_folder(tmp_path / "c", {"x": 5}, size=(48, 48))
    make_folder(tmp_path / "d", {"x": 3}, size=(32, 32))
    refused("evaluate.py", *flags, "--run", folder, says=["several sizes", "32 x 32", "40 x 32"])
    for name, more, says in (("c", ["--run", str(folder)], "48 x 48, those of the run 32 x 32"), ("d", [], "at least 4"),
                             ("c", [], "add --run")):
        flags = ["--folders", str(tmp_path / "a"), str(tmp_path / name), *more, *QUICK]
        with pytest.raises(ValueError, match=says):
            evaluate.evaluate(evaluate.parse_flags(flags), devices.Machine("cpu"))


@pytest.mark.parametrize("flags, says", [
    (["--num", 3], "--num 3: .* at least 4"),
    (["--batch", 0], "--batch"),
    (["--steps", 65], "steps must be from 1"),
    (["--schedule", "quartic"], "unknown schedule"),
    (["--sweep", "cfg"], "--class-dropout"),
    (["--sweep", "order", "--values", "spiral"], "unknown order"),
    (["--sweep", "choice_temperature", "--values", "warm"], "warm"),
    (["--ablate", "--ablate-steps", 99], "--ablate-steps"),
    (["--decoder", "autoregressive"], "autoregressive.pt does not exist"),
    (["--classifier-steps", 0], "--features inception"),
    (["--features", "inception", "--inception", "nowhere.pth"], "pip install torch-fidelity|nowhere.pth does not exist"),
])
def test_bad_input(folder, flags, says):
    with pytest.raises((ValueError, OSError), match=says):
        evaluated(folder, *flags)
    assert not (folder / "eval.json").exists()
