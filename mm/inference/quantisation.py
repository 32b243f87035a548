"""Which parts of a language model are quantised for inference."""

from torch import nn

from foundation.errors import UserError
from layers.feed_forward import SwiGLU
from layers.linear import Linear
from layers.quantised import ACTIVATION_BOUND, Float8SwiGLU, Int8Linear
from mm.language_model import DecoderLayer
from mm.model import MultimodalModel

QUANTISATIONS = ("fp8", "int8")


def quantise(model: MultimodalModel, kind: str, bound: float | None = ACTIVATION_BOUND) -> None:
    """Quantise a model in place, for inference alone.

    - "fp8": the feed-forwards of the language model except its first and its last layer, with scales for each row of
      weights and for each token (paper, on inference in FP8).
    - "int8": the weights of all products in the language model's layers, for small cards and CPUs.

    Embeddings, output layer, encoders and adapters keep their precision.

    Args:
        bound: of the scales of activations in FP8.

    Raises:
        UserError: another kind, a model that ranks share, or for "fp8" a feed-forward with biases.
    """
    if kind not in QUANTISATIONS:
        raise UserError(f"quantisation {kind!r} is not known; it can be {' or '.join(QUANTISATIONS)}")
    layers = model.language_model.model.layers
    if any(isinstance(part, Linear) and type(part) is not Linear for part in layers.modules()):
        raise UserError(f"quantisation is {kind!r}; a model that tensor-parallel ranks share is not quantised: omit it")
    if kind == "fp8":
        if model.config.language_model.mlp_bias:
            raise UserError(
                "quantisation fp8 takes no feed-forward with biases, which the language model has: use int8"
            )
        for layer in list(layers)[1:-1]:
            assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, SwiGLU)
            layer.mlp = Float8SwiGLU(layer.mlp, bound)  # type: ignore[assignment]  # the same function of x
        return
    for layer in layers:
        _to_int8(layer)


def _to_int8(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(module, name, Int8Linear(child))
        else:
            _to_int8(child)
