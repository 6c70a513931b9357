"""Measures of images, by their features, pixels and tokens. Nothing here knows where features come
from.

    gaussian, frechet_distance      FID (Heusel et al. 2017)
    inception_score                 IS (Salimans et al. 2016)
    precision_recall                precision and recall (Kynkäänniemi et al. 2019)
    psnr, sharpness                 by pixels
    accuracy_by_mask_ratio          of predicted tokens
"""
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLITS = 10         # of the Inception Score
NEIGHBOURS = 3      # of precision and recall
BINS = 20           # of mask ratios


class Gaussian(NamedTuple):
    """A normal distribution fitted to features."""
    mean: Tensor            # (D,)
    covariance: Tensor      # (D, D)
    factor: Tensor          # (D, r), r <= D: factor @ factor.T is the covariance


def gaussian(features: Tensor) -> Gaussian:
    """Fits a Gaussian to features (n, D), n >= 2, in float64. The covariance is divided by n - 1.
    """
    features = features.double()
    covariance = torch.cov(features.T)
    return Gaussian(features.mean(0), covariance, factor_of(covariance))


def factor_of(covariance: Tensor) -> Tensor:
    """Returns a matrix F (D, r) with F @ F.T = covariance (D, D), r being the rank of the
    covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues below the rounding error of the largest are zero, but their roots would not be
    # small.
    smallest = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    positive = values > smallest
    return vectors[:, positive] * values[positive].sqrt()


def frechet_distance(ours: Gaussian, theirs: Gaussian) -> float:
    """Returns |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), which is at least 0.

    tr (C1 C2)^½ is the sum of the singular values of A = F1ᵀ F2, the factors of C1 and C2: C1 C2
    has the nonzero eigenvalues of A Aᵀ, whose roots are A's singular values. This takes no square
    root of a product's rounding errors, so covariances may be singular, as they are with fewer
    images than features. Source: Heusel et al. 2017, Eq. 6; Dowson and Landau 1982."""
    means = (ours.mean - theirs.mean).square().sum()
    overlap = torch.linalg.svdvals(ours.factor.T @ theirs.factor).sum()
    distance = means + ours.covariance.trace() + theirs.covariance.trace() - 2 * overlap
    return distance.clamp(min=0).item()


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Returns exp(mean KL(p(y|x) || p(y))), from 1 (all images alike) to the number of classes, of
    logits (n, classes).

    It is computed in each of ten splits; returned are the mean and the standard deviation over
    them. The images are dealt out in the fixed random order of torch-fidelity, so that no split
    lacks a class. Source: Salimans et al. 2016, §4."""
    order = np.random.RandomState(2020).permutation(len(logits))
    logits = logits[order].double()
    splits = min(SPLITS, len(logits))
    scores = []
    for split in range(splits):
        first = split * len(logits) // splits
        end = (split + 1) * len(logits) // splits
        log_p = logits[first:end].log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        divergence = (p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(generated: Tensor, real: Tensor, chunk: int = 1000) -> tuple[float, float]:
    """Returns precision, the share of generated images near a real one, and recall, of real images
    near a generated one.

    generated: features (n, D). real: features (m, D). chunk: how many are compared at once; this
    takes memory for chunk · max(n, m) distances. Raises ValueError for a set of fewer than four
    images. Source: Kynkäänniemi et al. 2019, Eq. 1 and 2."""
    fewest = min(len(generated), len(real))
    if fewest <= NEIGHBOURS:
        raise ValueError(f"precision and recall need at least {NEIGHBOURS + 1} images in each set, "
                         f"not {fewest}")
    generated = generated.double()
    real = real.double()
    return share_near(generated, real, chunk), share_near(real, generated, chunk)


def share_near(points: Tensor, others: Tensor, chunk: int) -> float:
    """Returns the share of points (n, D) that are near at least one of the others (m, D).

    Near means no farther than that other point's own third nearest neighbour in its set."""
    radii = []
    for part in others.split(chunk):
        # The nearest neighbour of a point, at distance 0, is the point itself: hence + 1.
        radii.append(distances(part, others).kthvalue(NEIGHBOURS + 1, dim=1).values)
    radii = torch.cat(radii)                                                                # (m,)
    near = []
    for part in points.split(chunk):
        near.append((distances(part, others) <= radii).any(1))
    return torch.cat(near).double().mean().item()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Returns the Euclidean distances (n, m) of points (n, D) and (m, D): exactly 0 between equal
    points."""
    # A matrix product would be faster, but leaves rounding errors between equal points.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image in dB, at most 100: (n,).

    images, restored: (n, 3, H, W) in [0, 1]."""
    error = (restored - images).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10().double()


def sharpness(images: Tensor) -> Tensor:
    """Returns how sharp the edges of each image (n, 3, H, W) in [0, 1] are: (n,), to be compared
    with real images.

    It is the mean absolute difference of horizontal neighbours over the sharpest tenth of all
    places, which are edges and not noise."""
    differences = images.diff(dim=-1).abs().mean(1).flatten(1)                    # (n, H · (W - 1))
    tenth = differences.shape[1] // 10
    return differences.topk(tenth, dim=1).values.mean(1)


def accuracy_by_mask_ratio(right: Tensor, masked: Tensor, num_tokens: int) -> list[list[float]]:
    """Returns a list of [mask ratio, share of the masked tokens that are predicted right].

    right, masked: how many tokens of each image, (n,). Each point is of all masked tokens of the
    images whose mask ratios are up to 1/20, from there up to 2/20, and so on."""
    edges = num_tokens * torch.arange(1, BINS + 1)
    bins = torch.bucketize(masked * BINS, edges)
    points = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            ratio = masked[inside].double().mean() / num_tokens
            accuracy = right[inside].sum().double() / masked[inside].sum()
            points.append([round(ratio.item(), 4), accuracy.item()])
    return points
