"""Image encoders from open_clip's ViT towers; their features equal the outputs of the tower's blocks.

The recommended one is MetaCLIP's ViT-H/14: `load("ViT-H-14-quickgelu", "metaclip_fullcc")`. Pooling and the projection
into the joint space are left out. Tile positions and gated layers are new, with gates at 0.
"""

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foundation.errors import UserError
from layers.initial import draw
from layers.meta import meta_device
from mm.convert.report import load_tensors
from vision.encoder import CLIP_MEAN, CLIP_STD, VisionEncoder, VisionEncoderConfig, resize_positions

PAPER_LAYERS = 32
NEW_PARTS = ("gated_layers.", "pre_tile_position.", "post_tile_position.", "patch_position.tile", "patch_position.gate")


def load(
    model_name: str,
    pretrained: str | Path,
    tile_size: int | None = None,
    tap_points: tuple[int, ...] | None = None,
    num_gated_layers: int = 8,
) -> VisionEncoder:
    """Load an encoder with the weights of an open_clip model.

    Args:
        model_name: open_clip's name, such as "ViT-H-14-quickgelu".
        pretrained: open_clip's tag of the weights (downloaded from the hub, unless cached), or a local checkpoint file.
        tile_size, tap_points, num_gated_layers: see `from_model`.

    Raises:
        UserError: open_clip cannot load the name, tag or file, or `from_model` does not support the tower.
    """
    import open_clip

    known = open_clip.list_models()
    if ":" not in model_name and model_name not in known:  # names of folders and of the hub have a colon
        near = ", ".join(difflib.get_close_matches(model_name, known)) or "ViT-H-14-quickgelu"
        raise UserError(f"open_clip has no model {model_name}; it has {near} and others (open_clip.list_models())")
    try:
        model = open_clip.create_model(model_name, pretrained=str(pretrained), require_pretrained=True)
    except Exception as error:  # open_clip raises many kinds of errors
        raise UserError(f"open_clip cannot load {model_name} with weights {pretrained}: {error}") from error
    return from_model(model, tile_size, tap_points, num_gated_layers, source=f"{model_name} ({pretrained})")


def from_model(
    model: nn.Module,
    tile_size: int | None = None,
    tap_points: tuple[int, ...] | None = None,
    num_gated_layers: int = 8,
    source: str = "open_clip tower",
) -> VisionEncoder:
    """Build an encoder with a copy of the weights of an open_clip model, or of its `visual` tower.

    Args:
        tile_size: side of a tile; None takes the tower's image size, another one resizes the position table.
        tap_points: None takes the paper's fractions of the depth, see `default_tap_points`.
        num_gated_layers: new layers after the tower, the identity until they are trained.
        source: names the tower in the report, the encoder's attribute `report`.

    Raises:
        UserError: the tower is not a plain ViT; the message names the options that differ.
    """
    tower: Any = getattr(model, "visual", model)
    left_out = _check_tower(tower)
    blocks = tower.transformer.resblocks
    patch_size, image_size = tower.conv1.kernel_size[0], tower.image_size[0]
    config = VisionEncoderConfig(
        tile_size=tile_size or image_size,
        patch_size=patch_size,
        hidden_size=tower.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_layers=len(blocks),
        num_gated_layers=num_gated_layers,
        num_heads=blocks[0].attn.num_heads,
        tap_points=default_tap_points(len(blocks)) if tap_points is None else tuple(tap_points),
        activation="gelu" if isinstance(blocks[0].mlp.gelu, nn.GELU) else "quick_gelu",
        attention_bias=True,
        norm_eps=tower.ln_post.eps,
    )
    with meta_device() as initial:
        encoder = VisionEncoder(config)
    recorded, dtype = initial.of(encoder), tower.class_embedding.dtype
    new = {
        name: draw(recorded[name], tensor.shape, 0, f"vision_encoder.{name}").to(dtype)
        for name, tensor in encoder.state_dict().items()
        if name.startswith(NEW_PARTS)
    }
    old, reshaped = _tower_tensors(tower)
    old = resize_positions(old, image_size // patch_size, config.patches_per_side)
    if config.tile_size != image_size:
        reshaped.append(f"positional_embedding: resized from {image_size} to {config.tile_size} px, bilinear")
    encoder.report = load_tensors(
        encoder,
        new | {name: tensor.clone() for name, tensor in old.items()},
        source=source,
        reshaped=reshaped,
        ignored=left_out,
        notes=[f"new, at gate 0: {', '.join(part.rstrip('.') for part in NEW_PARTS)}"],
    )
    return encoder


def default_tap_points(num_layers: int) -> tuple[int, ...]:
    """The paper's tap points (4, 8, 16, 24, 31) of 32 layers, scaled to another depth and rounded down.

    Example: 24 layers give (3, 6, 12, 18, 23), 4 give (1, 2, 3).
    """
    points = (max(1, point * num_layers // PAPER_LAYERS) for point in (4, 8, 16, 24, 31))
    return tuple(sorted(set(points)))


def _tower_tensors(tower: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tower's weights under the encoder's names, and the changes of shape for the report."""
    conv = tower.conv1.weight.detach()  # [C, 3, p, p]: a patch is flattened in the same order
    tensors = {
        "patch_embedding.weight": conv.flatten(1),
        "class_embedding": tower.class_embedding.detach(),
        "patch_position.local": tower.positional_embedding.detach(),
        **_weight_and_bias("layernorm_pre", tower.ln_pre),
        **_weight_and_bias("layernorm_post", tower.ln_post),
    }
    for index, block in enumerate(tower.transformer.resblocks):
        layer = f"layers.{index}"
        weights, biases = block.attn.in_proj_weight.detach().chunk(3), block.attn.in_proj_bias.detach().chunk(3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors[f"{layer}.self_attn.{part}_proj.weight"] = weight
            tensors[f"{layer}.self_attn.{part}_proj.bias"] = bias
        tensors |= _weight_and_bias(f"{layer}.self_attn.o_proj", block.attn.out_proj)
        tensors |= _weight_and_bias(f"{layer}.input_layernorm", block.ln_1)
        tensors |= _weight_and_bias(f"{layer}.post_attention_layernorm", block.ln_2)
        tensors |= _weight_and_bias(f"{layer}.mlp.fc1", block.mlp.c_fc)
        tensors |= _weight_and_bias(f"{layer}.mlp.fc2", block.mlp.c_proj)
    reshaped = [
        f"conv1.weight: {list(conv.shape)} -> {list(conv.flatten(1).shape)}",
        "transformer.resblocks.*.attn.in_proj_weight and in_proj_bias: split into q, k and v",
    ]
    return tensors, reshaped


def _weight_and_bias(name: str, layer: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}


def _check_tower(tower: Any) -> dict[str, str]:
    """Check that a tower is a plain ViT; return the parts that are left out, with the reason.

    Raises:
        UserError: it is not; the message names the options that differ.
    """
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if not isinstance(tower, VisionTransformer):
        raise UserError(f"the tower is a {type(tower).__name__}; only open_clip's own ViT towers can be converted")
    blocks = list(tower.transformer.resblocks)
    norms = [tower.ln_pre, tower.ln_post, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    activations = [getattr(block.mlp, "gelu", None) for block in blocks]
    cfg = getattr(tower, "preprocess_cfg", None) or {}
    mean, std = tuple(cfg.get("mean", CLIP_MEAN)), tuple(cfg.get("std", CLIP_STD))
    refusals = {
        "another block than ResidualAttentionBlock (block_type, qk_norm, scale_*)": any(
            type(block) is not ResidualAttentionBlock for block in blocks
        ),
        "layer scale (ls_init_value)": any(not isinstance(block.ls_1, nn.Identity) for block in blocks),
        "no_ln_pre": isinstance(tower.ln_pre, nn.Identity),
        "attentional_pool": tower.attn_pool is not None,
        "final_ln_after_pool": tower.final_ln_after_pool,
        "an activation that is neither exact GELU nor QuickGELU": any(
            not isinstance(a, QuickGELU) and not (isinstance(a, nn.GELU) and a.approximate == "none")
            for a in activations
        ),
        "several kinds of activation": len({type(a) for a in activations}) > 1,
        "LayerNorms of several epsilons": len({getattr(norm, "eps", None) for norm in norms}) > 1,
        "an image or patch that is not square": len({*tower.image_size}) > 1 or len({*tower.conv1.kernel_size}) > 1,
        f"normalisation by mean {mean} and std {std} instead of CLIP's": (mean, std) != (CLIP_MEAN, CLIP_STD),
    }
    found = [name for name, present in refusals.items() if present]
    if found:
        raise UserError(f"the tower has {'; '.join(found)}, which the encoder does not support")
    left_out = {"proj": "it projects pooled features into the joint space, after the blocks"}
    if not isinstance(tower.patch_dropout, nn.Identity):
        left_out["patch_dropout"] = "it is only active in open_clip's training"
    if tower.pool_type != "tok":
        left_out[f"pool_type {tower.pool_type}"] = "it pools after the blocks; the encoder keeps all tokens"
    return left_out
