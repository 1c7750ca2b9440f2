"""References in NumPy for the tests of losses that compare what heads predict."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kl(p, q):
    """Of probabilities (..., K), summed over the last axis."""
    return (p * np.log(p / q)).sum(-1)


def binary_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def bce(q, p):
    """Of a probability q with the target p."""
    return -(p * np.log(q) + (1 - p) * np.log(1 - q))


def giou(a, b):
    """Of boxes (..., 4)."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = np.prod(np.clip(high - low, 0, None), -1)
    union = sum(np.prod(x[..., 2:] - x[..., :2], -1) for x in (a, b)) - overlap
    least, most = np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:])
    hull = np.prod(most - least, -1)
    return overlap / union - (hull - union) / hull


def arrays(predictions):
    """The fields of a prediction as arrays."""
    return {k: v.detach().numpy() for k, v in vars(predictions).items() if hasattr(v, "detach")}
