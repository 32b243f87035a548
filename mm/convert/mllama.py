"""Read and write Llama 3.2 Vision folders; a folder that is read and written keeps its names and bytes.

    folder -> config.json -> ModelConfig -> tensors under our names -> MultimodalModel -> folder

One table of names serves both directions. The layouts also differ in this: the released decoder counts cross-attention
blocks as layers, its embedding table ends with the eight extra rows, its patch embedding is a convolution, and its
position tables are flat.

Logits equal those of `transformers`, to rounding, under two conditions:
- The tap points are those of `transformers`: load with `tap_points=[i + 1 for i in intermediate_layers_indices]`.
  `transformers` keeps the output of block i, the reference implementation (which trained the weights) its input, the
  state after i completed blocks. By default we follow the reference.
- No row has text before its first image, and rows without images are in a batch without images. `transformers` does
  not mask the attention of a token that sees no image: it attends to all vision tokens of its row. In the reference and
  here, the cross-attention blocks do not change such a token.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layers.meta import meta_device
from mm.config import ModelConfig
from mm.convert.folder import new_folder, read_config, read_tensors, write_json, write_tensors
from mm.convert.llama_config import check_num_layers
from mm.convert.mllama_config import check_unchanged, config_values, model_config, with_dtype
from mm.convert.report import load_tensors
from mm.model import MultimodalModel

TABLE = "language_model.model.embed_tokens.weight"
EXTRA = "extra_embeddings"
HEAD = "language_model.lm_head.weight"
# Prefixes of our names -> prefixes of released names. Decoder layers are renumbered.
NAMES = {
    "vision_encoder.layers.": "vision_model.transformer.layers.",
    "vision_encoder.gated_layers.": "vision_model.global_transformer.layers.",
    "vision_encoder.patch_position.local": "vision_model.gated_positional_embedding.embedding",
    "vision_encoder.patch_position.tile": "vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision_encoder.patch_position.gate": "vision_model.gated_positional_embedding.gate",
    "vision_encoder.pre_tile_position.embedding": "vision_model.pre_tile_positional_embedding.embedding.weight",
    "vision_encoder.pre_tile_position.gate": "vision_model.pre_tile_positional_embedding.gate",
    "vision_encoder.post_tile_position.embedding": "vision_model.post_tile_positional_embedding.embedding.weight",
    "vision_encoder.post_tile_position.gate": "vision_model.post_tile_positional_embedding.gate",
    "vision_encoder.": "vision_model.",
    "image_adapter.projection.": "multi_modal_projector.",
}
GATES = {"gate_attn": "cross_attn_attn_gate", "gate_ffn": "cross_attn_mlp_gate"}
LAYER, BLOCK, STACK = "language_model.model.layers.", "image_adapter.blocks.", "language_model.model.layers."
# Prefixes of released names -> those that transformers 5 has in memory, and that some folders have.
RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "README*")


@dataclass(frozen=True)
class MllamaSource:
    """The folder that a model was read from; it is the model's attribute `mllama_source`, which `save` uses.

    Attributes:
        folder: its path.
        values: its config.json, with unknown fields.
        renamed: whether its tensors have the names of `RENAMED`.
    """

    folder: Path
    values: dict[str, Any]
    renamed: bool


def load(
    folder: str | Path, tap_points: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> MultimodalModel:
    """Load a model from a Llama 3.2 Vision folder: config.json and safetensors.

    Args:
        tap_points: encoder depths whose states are features, in completed blocks. None takes the folder's
            intermediate_layers_indices (released: 3, 7, 15, 23, 30), like the reference. For the results of
            `transformers`, give each index plus 1; see this module's docstring.
        dtype: of the weights; None keeps the folder's.

    Returns:
        the model; its attribute `report` is a `LoadingReport`.

    Raises:
        UserError: it is another kind of model, a setting or tensor is not supported, or a file is damaged; the message
            names it.
    """
    folder = Path(folder)
    values, generation = read_config(folder)
    stored = read_tensors(folder, dtype)
    renamed = any(name.startswith("model.vision_model.") for name in stored)
    head = released_to_stored(HEAD, renamed)
    config, notes = model_config(values, generation, tap_points, has_head=head in stored)
    encoder = config.vision_encoder
    assert encoder is not None
    check_num_layers(config.language_model.num_layers + encoder.num_layers + encoder.num_gated_layers, len(stored))
    with meta_device():
        model = MultimodalModel(config)
    tensors: dict[str, Tensor] = {}
    reshaped = []
    for name, parameter in model.state_dict().items():
        folder_name = stored_name(name, config, renamed)
        if folder_name not in stored or name == EXTRA:
            continue
        tensor = stored.pop(folder_name)
        if name == TABLE:
            rows = config.language_model.vocab_size
            tensors[EXTRA] = tensor[rows:].clone()
            tensor = tensor[:rows]
            reshaped.append(f"{folder_name}: split into {list(tensor.shape)} and {list(tensors[EXTRA].shape)} rows")
        elif tuple(tensor.shape) == stored_shape(name, config, tuple(parameter.shape)) != tuple(parameter.shape):
            reshaped.append(f"{folder_name}: {list(tensor.shape)} -> {list(parameter.shape)}")
            tensor = tensor.reshape(parameter.shape)
        tensors[name] = tensor
    ignored = {name: "rotary frequencies are computed" for name in stored if name.endswith("rotary_emb.inv_freq")}
    tensors |= {name: tensor for name, tensor in stored.items() if name not in ignored}
    model.report = load_tensors(
        model,
        tensors,
        source=folder,
        stored_name=lambda name: stored_name(name, config, renamed),
        reshaped=reshaped,
        ignored=ignored,
        notes=notes,
    )
    model.mllama_source = MllamaSource(folder, values, renamed)
    return model


def save(model: MultimodalModel, folder: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as a Llama 3.2 Vision folder, which `load` and `transformers` read.

    For a model from `load`, config.json, tensor names, tokenizer and processor files are those of its folder. Other
    models get a new config.json and no tokenizer.

    Args:
        folder: new or empty; nothing is left behind if writing fails.
        max_shard_bytes: largest size of a safetensors file; larger models get several and an index.

    Raises:
        UserError: mllama cannot express a field of the configuration, or the folder is not empty.
    """
    source = model.mllama_source
    assert source is None or isinstance(source, MllamaSource)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if source is None:
        values, renamed = config_values(model.config), False
    else:
        values, renamed = source.values, source.renamed
        check_unchanged(values, model.config)
    values = with_dtype(values, dtypes)
    with new_folder(folder) as new:
        if source is not None and source.folder.is_dir():
            _copy_side_files(source.folder, new)
        write_json(new / "config.json", values)
        write_tensors(new, dict(_stored(model, renamed, keep_head=source is None)), max_shard_bytes)


def stored_name(name: str, config: ModelConfig, renamed: bool = False) -> str:
    """Our name of a parameter -> the folder's.

    Example: image_adapter.blocks.0.gate_attn -> language_model.model.layers.3.cross_attn_attn_gate
    """
    assert config.image_adapter is not None
    positions = config.image_adapter.block_positions(config.language_model.num_layers)
    if name == EXTRA:
        name = TABLE
    elif name.startswith(LAYER):
        layer, _, rest = name.removeprefix(LAYER).partition(".")
        num_blocks_before = sum(position <= int(layer) for position in positions)
        name = f"{STACK}{int(layer) + num_blocks_before}.{rest}"
    elif name.startswith(BLOCK):
        block, _, rest = name.removeprefix(BLOCK).partition(".")
        name = f"{STACK}{positions[int(block)] + int(block)}.{GATES.get(rest, rest)}"
    else:
        prefix = next((prefix for prefix in NAMES if name.startswith(prefix)), "")
        name = NAMES.get(prefix, "") + name.removeprefix(prefix)
    return released_to_stored(name, renamed)


def released_to_stored(name: str, renamed: bool) -> str:
    """A released name, with the prefixes of `RENAMED` if `renamed`."""
    prefix = next((prefix for prefix in RENAMED if name.startswith(prefix)), "") if renamed else ""
    return RENAMED.get(prefix, "") + name.removeprefix(prefix)


def stored_shape(name: str, config: ModelConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a folder of one of our parameters, whose own shape is `shape`."""
    encoder = config.vision_encoder
    assert encoder is not None
    if name == "vision_encoder.patch_embedding.weight":
        return shape[0], 3, encoder.patch_size, encoder.patch_size
    if name in (
        "vision_encoder.patch_position.tile",
        "vision_encoder.pre_tile_position.embedding",
        "vision_encoder.post_tile_position.embedding",
    ):
        rows, *rest = shape
        return rows, torch.Size(rest).numel()
    return shape


def _stored(model: MultimodalModel, renamed: bool, keep_head: bool) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under the folder's names and in its shapes.

    A head that is tied to the embedding table is only written with `keep_head`: `transformers` does not tie mllama's.
    """
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == EXTRA or (name == HEAD and config.language_model.tied_embeddings and not keep_head):
            continue
        if name == TABLE:
            tensor = torch.cat([tensor, model.extra_embeddings.detach().to(tensor)])
        yield stored_name(name, config, renamed), tensor.reshape(stored_shape(name, config, tuple(tensor.shape)))


def _copy_side_files(old: Path, new: Path) -> None:
    """Copy tokenizer, processor and licence files; config.json and the index of the weights are written anew."""
    for pattern in SIDE_FILES:
        for path in old.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json") and path.name != "config.json":
                shutil.copyfile(path, new / path.name)
