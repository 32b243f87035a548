"""Llama 3.2 Vision folders, in and out again: same names, same bytes.

    folder -> config.json -> ModelConfig -> tensors under our names -> MultimodalModel -> back

One table of names serves both ways. What differs between the layouts, besides names: the released stack counts the
cross-attention blocks as layers, its embedding table has the eight extra rows at its end, its patch embedding is a
convolution, and its position tables are flat. `transformers` taps the encoder one block later than the reference that
made the weights; an index of the folder is read here as the reference reads it, as a number of completed blocks.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layers.meta import meta_device
from mm.config import ModelConfig
from mm.convert.folder import new_folder, read_config, read_tensors, write_json, write_tensors
from mm.convert.llama_config import check_num_layers
from mm.convert.mllama_config import config_values, model_config, same_meaning, with_dtype
from mm.convert.report import load_tensors
from mm.model import MultimodalModel

TABLE = "language_model.model.embed_tokens.weight"
EXTRA = "extra_embeddings"
HEAD = "language_model.lm_head.weight"
# Our names -> released names, by their beginnings; the numbers of decoder layers are counted anew.
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
# Released names -> those of a model in memory in transformers 5, which some folders have.
RENAMED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "USE_POLICY*", "README*")


@dataclass(frozen=True)
class MllamaSource:
    """The folder that a model was read from, kept on the model as `mllama_source` so that `save` can give it back.

    Attributes:
        folder: where it lay.
        values: its config.json, unknown fields included.
        renamed: its tensors have the names of `RENAMED`.
    """

    folder: Path
    values: dict
    renamed: bool


def load(
    folder: str | Path, tap_points: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> MultimodalModel:
    """A model from a Llama 3.2 Vision folder: config.json and safetensors.

    Args:
        tap_points: encoder depths in completed blocks; None reads the folder's intermediate_layers_indices as such
            (released: 3, 7, 15, 23, 30). `transformers` computes what i + 1 for each of them gives.
        dtype: of the weights; None keeps the folder's.

    Returns:
        the model, with what happened to each tensor in its attribute `report`.

    Raises:
        UserError: another kind of model, a setting or tensor that the model does not have, by name, or damage.
    """
    folder = Path(folder)
    values, generation = read_config(folder)
    stored = read_tensors(folder, dtype)
    renamed = any(name.startswith("model.vision_model.") for name in stored)
    head = released_to_stored(HEAD, renamed)
    config, notes = model_config(values, generation, tap_points, has_head=head in stored)
    encoder = config.vision_encoder
    check_num_layers(config.language_model.num_layers + encoder.num_layers + encoder.num_gated_layers, len(stored))
    with meta_device():
        model = MultimodalModel(config)
    tensors, reshaped = {}, []
    for name, parameter in model.state_dict().items():
        place = stored_name(name, config, renamed)
        if place not in stored or name == EXTRA:
            continue
        tensor = stored.pop(place)
        if name == TABLE:
            rows = config.language_model.vocab_size
            tensors[EXTRA] = tensor[rows:].clone()
            tensor = tensor[:rows]
            reshaped.append(f"{place}: {list(tensor.shape)} and {list(tensors[EXTRA].shape)}, its last rows apart")
        elif tuple(tensor.shape) == stored_shape(name, config, tuple(parameter.shape)) != tuple(parameter.shape):
            reshaped.append(f"{place}: {list(tensor.shape)} -> {list(parameter.shape)}")
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

    A model that `load` read gets its config.json, tensor names, tokenizer and processor files back as they were; any
    other gets a config.json of its own, if mllama can express it (it has no tokenizer to write).

    Args:
        folder: new or empty; nothing is left there if writing fails.
        max_shard_bytes: of one safetensors file; more tensors than fit are spread over several, with an index.

    Raises:
        UserError: a field that mllama cannot express, by name, or a folder that holds something.
    """
    source = getattr(model, "mllama_source", None)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if source is None:
        values, renamed = config_values(model.config), False
    else:
        values, renamed = source.values, source.renamed
        same_meaning(values, model.config)
    values = with_dtype(values, dtypes)
    with new_folder(folder) as new:
        if source is not None and source.folder.is_dir():
            _copy_side_files(source.folder, new)
        write_json(new / "config.json", values)
        write_tensors(new, _stored(model, renamed, keep_head=source is None), max_shard_bytes)


def stored_name(name: str, config: ModelConfig, renamed: bool = False) -> str:
    """The name in a folder of one of our parameters, e.g. image_adapter.blocks.0.gate_attn ->
    language_model.model.layers.3.cross_attn_attn_gate."""
    positions = config.image_adapter.block_positions(config.language_model.num_layers)
    if name == EXTRA:
        name = TABLE
    elif name.startswith(LAYER):
        number, _, rest = name.removeprefix(LAYER).partition(".")
        earlier = sum(position <= int(number) for position in positions)
        name = f"{STACK}{int(number) + earlier}.{rest}"
    elif name.startswith(BLOCK):
        number, _, rest = name.removeprefix(BLOCK).partition(".")
        name = f"{STACK}{positions[int(number)] + int(number)}.{GATES.get(rest, rest)}"
    else:
        beginning = next((start for start in NAMES if name.startswith(start)), "")
        name = NAMES.get(beginning, "") + name.removeprefix(beginning)
    return released_to_stored(name, renamed)


def released_to_stored(name: str, renamed: bool) -> str:
    """A released name, or its other spelling."""
    beginning = next((start for start in RENAMED if name.startswith(start)), "") if renamed else ""
    return RENAMED.get(beginning, "") + name.removeprefix(beginning)


def stored_shape(name: str, config: ModelConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a folder of one of our parameters, whose shape here is `shape`."""
    encoder = config.vision_encoder
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
    """What a folder holds: the folder's names, and our parameters in the folder's shapes.

    A head that is tied to the table is written only with `keep_head`: `transformers` does not tie mllama's.
    """
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == EXTRA or (name == HEAD and config.language_model.tied_embeddings and not keep_head):
            continue
        if name == TABLE:
            tensor = torch.cat([tensor, model.extra_embeddings.detach().to(tensor)])
        yield stored_name(name, config, renamed), tensor.reshape(stored_shape(name, config, tuple(tensor.shape)))


def _copy_side_files(old: Path, new: Path) -> None:
    """Tokenizer, processor and licence files; the weights' index and config.json are written anew."""
    for pattern in SIDE_FILES:
        for path in old.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json") and path.name != "config.json":
                shutil.copyfile(path, new / path.name)
