"""Measures of images, by features of them and by their pixels.

    moments, gaussian, frechet_distance         FID (Heusel et al. 2017)
    split_of, score_sums, inception_score       IS (Salimans et al. 2016)
    precision_recall                            precision and recall (Kynkäänniemi et al. 2019)
    psnr, sharpness                             by pixels

moments and score_sums return dicts of float64 tensors that add up: over batches, over processes, over an
interruption. So 50,000 images take no more memory than 500. Nothing here knows where features come from.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F

SPLITS, NEIGHBOURS = 10, 3      # of the Inception Score; of precision and recall


def moments(features, shift):
    """Sums from which mean and covariance follow. features: (n, D). shift: (D,), the same for all that is added up.

    Squares of numbers far from zero would swallow their differences: a point amid the features is taken off first."""
    x = features.double() - shift
    return {"count": x.new_tensor(len(x)), "sum": x.sum(0), "outer": x.T @ x}


def gaussian(sums, shift):
    """Of what moments() summed -> mean (D,), covariance (D, D) with n - 1 below, its square_root(). Needs n >= 2."""
    n, mean = sums["count"], sums["sum"] / sums["count"]
    covariance = (sums["outer"] - n * torch.outer(mean, mean)) / (n - 1)
    return shift + mean, covariance, square_root(covariance)


def frechet_distance(mean1, covariance1, root1, mean2, covariance2, root2):
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), between two Gaussians as of gaussian(), a float >= 0.

    tr (C1 C2)^½ is the sum of the singular values of C1^½ C2^½: no square root of a product's rounding errors is taken,
    so covariances may be singular, as they are with fewer images than features. Source: Heusel et al. 2017, Eq. 6;
    Dowson and Landau 1982."""
    overlap = torch.linalg.svdvals(root1.T @ root2).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * overlap
    return distance.clamp(min=0).item()


def square_root(covariance):
    """(D, D) of rank r -> a factor F (D, r) with F Fᵀ = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # What lies below the rounding error of the largest eigenvalue is zero, or its root would be far from small.
    some = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, some] * values[some].sqrt()


@functools.cache
def split_of(count):
    """Which of the splits each of `count` images belongs to -> (count,) int64; no more splits than images.

    Images are dealt out in a fixed random order, that of torch-fidelity, so that no split lacks a class."""
    splits, place = min(SPLITS, count), np.random.RandomState(2020).permutation(count).argsort()
    return torch.from_numpy(((place + 1) * splits - 1) // count)          # split i begins at place ⌊i · count / splits⌋


def score_sums(logits, split):
    """Sums for inception_score. logits: (n, classes). split: (n,), of each image."""
    log_p = logits.double().log_softmax(1)
    p, member = log_p.exp(), F.one_hot(split, SPLITS).double().T                            # member: (splits, n)
    return {"split_count": member.sum(1), "split_p": member @ p, "split_p_log_p": member @ (p * log_p).sum(1)}


def inception_score(sums):
    """exp of the mean divergence KL(p(y|x) || p(y)) within each split -> mean and standard deviation over the splits.

    From 1, all alike, to the number of classes. Source: Salimans et al. 2016, §4."""
    some = sums["split_count"] > 0
    n = sums["split_count"][some]
    marginal = sums["split_p"][some] / n[:, None]
    scores = (sums["split_p_log_p"][some] / n - torch.xlogy(marginal, marginal).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(generated, real, rows=1000):
    """Precision: the share of generated images near a real one; recall: of real images near a generated one.

    Near: no farther than that image's own third nearest neighbour in its set. generated (n, D), real (m, D), features.
    rows: how many are compared at once; memory for rows · max(n, m) distances. Returns two floats in [0, 1]. Raises
    ValueError where a set has not four images. Source: Kynkäänniemi et al. 2019, Eq. 1 and 2."""
    fewest = min(len(generated), len(real))
    if fewest <= NEIGHBOURS:
        raise ValueError(f"precision and recall need at least {NEIGHBOURS + 1} images in each set, not {fewest}")
    generated, real = generated.double(), real.double()
    # By differences, not by the faster product: equal features must be at distance 0.
    distances = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    def share_near(images, others):       # the nearest neighbour of an image, at distance 0, is itself: hence + 1
        radius = torch.cat([distances(part, others).kthvalue(NEIGHBOURS + 1, 1).values for part in others.split(rows)])
        near = torch.cat([(distances(part, others) <= radius).any(1) for part in images.split(rows)])
        return near.double().mean().item()

    return share_near(generated, real), share_near(real, generated)


def psnr(images, restored):
    """Peak signal-to-noise ratio of each image in dB: (n, 3, H, W) in [0, 1], twice -> (n,) float64, at most 100."""
    return -10 * (restored - images).square().mean((1, 2, 3)).clamp(min=1e-10).log10().double()


def sharpness(images):
    """Mean absolute difference of horizontal neighbours over each image's sharpest tenth of places: edges, not noise.

    (n, 3, H, W) in [0, 1] -> a scalar tensor; compare it with that of real images."""
    steps = images.diff(dim=-1).abs().mean(1).flatten(1)
    return steps.topk(steps.shape[1] // 10, dim=1).values.mean()
