"""Which modules of the model are split, gathered, kept in FP32 and checkpointed.

The trainer applies these tables, and the planner counts by the same ones.
"""

from enum import Enum

from torch import nn

from layers.attention import CrossAttention
from layers.linear import Linear
from mm.cross_attention import CrossAttentionBlock
from mm.language_model import DecoderLayer, LanguageModel
from mm.video_adapter import VideoAdapter
from speech.conformer import ConformerLayer, SpeechEncoder
from video.aggregator import AggregatorLayer
from vision.encoder import EncoderLayer, VisionEncoder

# Layers whose activations are computed again in the backward pass (`activation_checkpointing`), and that are compiled.
CHECKPOINTED_MODULES: tuple[type[nn.Module], ...] = (
    *(DecoderLayer, EncoderLayer, CrossAttentionBlock, AggregatorLayer, ConformerLayer),
)
# Modules that FSDP gathers one at a time. Every rank must run each of them equally often. An encoder's layers run once
# per number of tiles and an aggregator's once per size of a group, so the whole encoder and adapter are gathered.
FSDP_MODULES: tuple[type[nn.Module], ...] = (
    *(DecoderLayer, VisionEncoder, CrossAttentionBlock, VideoAdapter, SpeechEncoder),
)
# Of those, the ones whose inputs FSDP does not round to bf16: a block takes FP32 vision tokens, in which the gradients
# of all blocks are summed, and rounds them for each of its products.
FP32_INPUT_MODULES: tuple[type[nn.Module], ...] = (CrossAttentionBlock,)


class Split(Enum):
    """How tensor-parallel ranks share a linear layer."""

    OUTPUTS = "outputs"  # column-wise: each rank has some rows of the weight and the same elements of the bias
    INPUTS = "inputs"  # row-wise: each rank has some columns of the weight; the bias is whole on each


_ATTENTION = {"q_proj": Split.OUTPUTS, "k_proj": Split.OUTPUTS, "v_proj": Split.OUTPUTS, "o_proj": Split.INPUTS}
_SWIGLU = {"mlp.gate_proj": Split.OUTPUTS, "mlp.up_proj": Split.OUTPUTS, "mlp.down_proj": Split.INPUTS}
_MLP = {"mlp.fc1": Split.OUTPUTS, "mlp.fc2": Split.INPUTS}

# Kind of module -> its linear layers that tensor-parallel ranks share. All other parameters are whole on every rank.
TENSOR_PARALLEL: dict[type[nn.Module], dict[str, Split]] = {
    DecoderLayer: {**{f"self_attn.{name}": split for name, split in _ATTENTION.items()}, **_SWIGLU},
    CrossAttentionBlock: {**{f"cross_attn.{name}": split for name, split in _ATTENTION.items()}, **_SWIGLU},
    EncoderLayer: {**{f"self_attn.{name}": split for name, split in _ATTENTION.items()}, **_MLP},
    LanguageModel: {"lm_head": Split.OUTPUTS},
}


def shared_linears(module: nn.Module, tp: int) -> dict[str, Split]:
    """The linear layers of a module that `tp` ranks share, by their dotted names in it.

    `lm_head` is left out where it is the embedding table as well, or `tp` does not divide the vocabulary, or a
    pipeline stage does not hold it.
    """
    found: dict[str, Split] = {}
    for name, part in module.named_modules():
        for kind, linears in TENSOR_PARALLEL.items():
            if isinstance(part, kind) and (not isinstance(part, LanguageModel) or shares_head(part, tp)):
                found |= {f"{name}.{inner}" if name else inner: split for inner, split in linears.items()}
    return found


def shares_head(language_model: LanguageModel, tp: int) -> bool:
    """Whether tensor-parallel ranks share `lm_head`, see `shared_linears`."""
    config = language_model.config
    held = isinstance(language_model.lm_head, nn.Linear)
    return held and not config.tied_embeddings and config.vocab_size % tp == 0


def kept_as_stored(module: nn.Module) -> set[str]:
    """The names of the parameters that a run in bf16 keeps in the type of their file while they are frozen.

    These are the matrices of the layers and the language model's tables. Everything else is small, or its type decides
    in which type others compute: vision tokens are projected, and their keys and values computed, in FP32.
    """
    kept: set[int] = set()
    for part in module.modules():
        if isinstance(part, (DecoderLayer, CrossAttentionBlock, EncoderLayer)):
            kept |= {id(linear.weight) for linear in part.modules() if isinstance(linear, Linear)}
        if isinstance(part, LanguageModel):
            tables = (part.model.embed_tokens, part.lm_head)
            kept |= {id(table.weight) for table in tables if isinstance(table, (Linear, nn.Embedding))}
    for part in module.modules():
        if isinstance(part, CrossAttention):
            kept -= {id(part.k_proj.weight), id(part.v_proj.weight)}
    return {name for name, parameter in module.named_parameters() if id(parameter) in kept}
