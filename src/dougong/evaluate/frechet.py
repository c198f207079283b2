"""Fréchet distance between two sets of points, each summed up by a Gaussian: is what was made like what is real?

Heusel et al. 2017 (arXiv:1706.08500, equation 6) measure it between an image network's features; here it is measured
between the pixels themselves, which small images allow and which needs no other model.
"""

import numpy as np


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), the squared 2-Wasserstein distance of two Gaussians.

    It is biased upwards for few points (about D²/N of their variance), so compare sets of equal size only.
    """
    means = [points.astype(np.float64).mean(0) for points in (a_ND, b_MD)]
    covariances = [np.atleast_2d(np.cov(points.astype(np.float64), rowvar=False)) for points in (a_ND, b_MD)]
    root = _symmetric_root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)   # the eigenvalues of Σa Σb, in symmetric form
    trace = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(((means[0] - means[1]) ** 2).sum() + trace)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
