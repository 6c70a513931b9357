"""lib/metrics.py, against plain computations in numpy."""
import numpy as np
import pytest
import torch

from lib import metrics


def frechet_by_singular_values(x, y):
    """In float64 and without any matrix root: C1 = aᵀa and C2 = bᵀb, and the eigenvalues of C1 C2 are the squares of
    the singular values of a bᵀ."""
    a = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * overlap


def frechet_by_the_formula(x, y):
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½). For covariances that are not singular."""
    c1 = np.cov(x, rowvar=False)
    c2 = np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2) - 2 * roots.sum()


def two_sets(n, m, D):
    """Correlated features far from zero."""
    g = np.random.default_rng(0)
    mix = g.standard_normal((D, D))
    x = g.standard_normal((n, D)) @ mix + 100
    y = g.standard_normal((m, D)) @ mix * 1.1 + 99
    return x, y


def distance(x, y):
    return metrics.frechet_distance(metrics.gaussian(torch.tensor(x)), metrics.gaussian(torch.tensor(y)))


def test_frechet_distance_is_the_formula():
    x, y = two_sets(400, 300, 20)
    assert distance(x, y) == pytest.approx(frechet_by_the_formula(x, y), rel=1e-6)


@pytest.mark.parametrize("n, m, D", [(400, 300, 20), (30, 50, 100), (30, 400, 60)])
def test_frechet_distance_of_singular_covariances(n, m, D):
    """Fewer images than features leave directions in which nothing varies."""
    x, y = two_sets(n, m, D)
    assert distance(x, y) == pytest.approx(frechet_by_singular_values(x, y), rel=1e-6)
    assert distance(x, x) < 1e-6 * np.square(x - x.mean(0)).sum() / n


def test_a_gaussian_of_features_far_from_zero():
    x = 1e6 + np.random.default_rng(1).standard_normal((101, 7))
    mean, covariance, root = metrics.gaussian(torch.tensor(x))
    assert np.allclose(mean, x.mean(0), rtol=1e-12, atol=0)
    assert np.allclose(covariance, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)
    assert torch.allclose(root @ root.T, covariance)


def inception_score_in_numpy(logits):
    """Mean and deviation over ten splits, dealt out as torch-fidelity does."""
    scores = []
    order = np.random.RandomState(2020).permutation(len(logits))
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[order]
    for i in range(10):
        part = p[i * len(p) // 10:(i + 1) * len(p) // 10]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


def test_inception_score():
    logits = 3 * np.random.default_rng(0).standard_normal((101, 5))
    assert metrics.inception_score(torch.tensor(logits)) == pytest.approx(inception_score_in_numpy(logits), rel=1e-10)


def test_the_inception_score_goes_from_1_to_the_number_of_classes():
    assert metrics.inception_score(torch.zeros(60, 6)) == pytest.approx((1, 0))
    certain = 1e3 * torch.eye(6).repeat(1000, 1)                # each sure of a class of its own, as often as the others
    assert metrics.inception_score(certain)[0] == pytest.approx(6, rel=1e-2)
    score, deviation = metrics.inception_score(torch.eye(3))                          # fewer images than splits
    assert score == pytest.approx(1) and deviation == pytest.approx(0)


def share_near_in_numpy(images, others):
    radii = []
    for point in others:
        squares = ((others - point) ** 2).sum(1)
        radii.append(np.sort(squares)[3])                       # the nearest is the point itself
    near = []
    for point in images:
        near.append((((others - point) ** 2).sum(1) <= radii).any())
    return np.mean(near)


@pytest.mark.parametrize("n, m", [(40, 57), (57, 40), (4, 9)])
def test_precision_and_recall(n, m):
    g = np.random.default_rng(n)
    x = 1e7 + g.standard_normal((n, 6))
    y = 1e7 + g.standard_normal((m, 6))
    precision, recall = metrics.precision_recall(torch.tensor(x), torch.tensor(y), chunk=7)
    assert precision == share_near_in_numpy(x, y) and recall == share_near_in_numpy(y, x)
    if n > 10:
        assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_precision_and_recall_of_images_that_coincide():
    """Many radii and distances are exactly 0, and equal points must be near each other."""
    g = np.random.default_rng(3)
    points = 1e7 + g.standard_normal((12, 6))
    x = points[g.integers(0, 8, 57)]
    y = points[g.integers(4, 12, 40)]
    found = metrics.precision_recall(torch.tensor(x), torch.tensor(y), chunk=7)
    assert found == (share_near_in_numpy(x, y), share_near_in_numpy(y, x)) and 0 < min(found) < 1


def test_precision_and_recall_need_four_images():
    with pytest.raises(ValueError, match="at least 4 images in each set, not 3"):
        metrics.precision_recall(torch.zeros(3, 6), torch.zeros(9, 6))


def test_psnr():
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.1 * torch.tensor([1., -1.]).repeat(8)
    assert torch.allclose(metrics.psnr(images, noisy), torch.tensor(20.).double(), atol=1e-4)
    assert (metrics.psnr(images, images) == 100).all()


def test_sharpness_is_of_the_sharpest_tenth():
    """An edge of height 0.5 in one of the 15 steps of each row, that is in less than a tenth of all places."""
    edge = torch.cat([torch.zeros(1, 3, 16, 5), torch.full((1, 3, 16, 11), 0.5)], -1)
    both = metrics.sharpness(torch.cat([edge, torch.zeros_like(edge)]))
    assert both.tolist() == [pytest.approx(0.5 * 16 / (240 // 10)), 0]
