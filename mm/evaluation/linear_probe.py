"""A linear probe: how well an image encoder's features tell classes apart, without any language model.

It bounds what can be expected of an adapter over the same encoder, whose answers need the same features. Multinomial
logistic regression on mean-pooled features, as in Radford et al. 2021 (CLIP), section 3.2.
Shapes: N pictures, F feature channels, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import UserError
from vision.encoder import VisionEncoder
from vision.tiling import Tiles


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        classes: names, sorted.
        mean, std: of the features that it was fitted to, [F].
        weight, bias: of the standardised features, [C, F] and [C].
    """

    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> list[str]:
        """The most probable class of each picture. Args: features: [N, F]."""
        logits = (features - self.mean) / self.std @ self.weight.T + self.bias
        return [self.classes[index] for index in logits.argmax(-1).tolist()]


def pooled_features(encoder: VisionEncoder, images: Sequence[Tiles], batch_size: int = 64) -> Tensor:
    """The mean of each image's vision tokens, final output and tapped states alike, FP32 [N, F] on the CPU.

    Args:
        batch_size: images per forward pass; the features do not depend on it, but for rounding.

    Raises:
        UserError: as `VisionEncoder.forward`.
    """
    device = encoder.class_embedding.device
    pooled: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = [tiles.to(device) for tiles in images[start : start + batch_size]]
            sizes = [encoder.num_vision_tokens(tiles) for tiles in batch]
            pooled += [tokens.float().mean(0).cpu() for tokens in encoder(batch).split(sizes)]
    return torch.stack(pooled) if pooled else torch.zeros(0, encoder.config.feature_size)


def fit_linear_probe(
    features: Tensor, labels: Sequence[str], l2: float = 1e-3, max_iterations: int = 200
) -> LinearProbe:
    """Logistic regression from features to labels: the mean cross-entropy plus l2 / 2 times the sum of squared weights.

    Features are standardised; the bias has no penalty. L-BFGS over the whole set, in FP32, from zeros: the result
    depends on nothing random.

    Args:
        features: [N, F].
        labels: N class names.
        l2: strength of the penalty.

    Raises:
        UserError: no or a single class, another number of labels than of features, or l2 below 0.
    """
    if len(features) != len(labels):
        raise UserError(f"{len(features)} pictures and {len(labels)} labels; each picture needs one")
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise UserError(f"the labels hold {len(classes)} classes; a probe needs at least 2 to tell apart")
    if not l2 >= 0:
        raise UserError(f"l2 is {l2}; it must be 0 or more")
    features = features.detach().float().clone()  # not of inference mode, which takes part in no gradient
    mean, std = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    standardised = (features - mean) / std
    index_of = {name: index for index, name in enumerate(classes)}
    targets = torch.tensor([index_of[label] for label in labels])
    weight = torch.zeros(len(classes), features.shape[1], requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standardised @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearProbe(classes, mean, std, weight.detach(), bias.detach())
