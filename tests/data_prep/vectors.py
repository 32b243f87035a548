"""Random vectors with known near neighbours."""

import numpy as np


def vectors_with_copies(groups: int, copies: int, dim: int = 64, noise: float = 0.3) -> np.ndarray:
    """float16 [groups * copies, dim], in random order: copies of random directions, with cosines of about
    1 / (1 + noise^2)."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(groups, 1, dim))
    vectors = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors = vectors + noise / np.sqrt(dim) * generator.normal(size=(groups, copies, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).reshape(-1, dim)
    return vectors[generator.permutation(len(vectors))].astype(np.float16)
