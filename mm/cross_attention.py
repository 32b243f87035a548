"""The image adapter: the projection of vision features and the gated cross-attention blocks (paper §7.2).

A block stands between two layers of the frozen language model. With its gates at 0 it is the identity.
Shapes: R rows that hold images, T text tokens, S vision tokens of the row that holds most, D width of the LM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from layers.attention import CrossAttention
from layers.feed_forward import SwiGLU
from layers.initial import Normal, draw
from layers.linear import Linear
from layers.sources import read
from mm.language_model import LanguageModelConfig
from mm.vision_context import CrossAttentionMask

TARGET_STD = 0.9  # of SwiGLU's inputs before answers; those of other tokens vary two to three times as much
MIN_DIFFERENCE = 0.1  # between pictures, as a share of what is read of one: nearly equal ones are not amplified further
MAX_SCALE = 60.0  # limit of the scale of channels that are near 0


@dataclass(frozen=True)
class ImageAdapterConfig:
    """Positions and initialisation of the blocks.

    Attributes:
        positions: the number of LM layers completed before each block. None is the paper's placement, after every
            4th layer (4, 8, ...); released Llama 3.2 Vision models have (3, 7, 11, ...).
        intermediate_size: width of the blocks' feed-forward; None is the LM's own.
        gate_init: initial value of every gate. A new adapter is the identity either way: at 0 because gates are closed
            (paper); at other values because the branches' last matrices start at 0, which then learn at once (ours).
        fit_inputs: initialise the blocks from the LM's hidden states (`CrossAttentionBlock.fit_inputs`).
    """

    positions: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    gate_init: float = 0.0
    fit_inputs: bool = False

    def block_positions(self, num_layers: int) -> tuple[int, ...]:
        """The positions in a language model of `num_layers`, ascending."""
        positions = tuple(range(4, num_layers + 1, 4)) if self.positions is None else tuple(self.positions)
        if sorted(set(positions)) != list(positions) or any(not 0 <= p <= num_layers for p in positions):
            raise UserError(
                f"adapter positions {positions} must ascend within 0..{num_layers}, the number of completed LM layers"
            )
        return positions


@dataclass
class VisionCache:
    """One block's keys and values of each row's images, [R, G, S, head_dim] at KV-head size, computed once."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Keep what a prompt's pass has computed."""
        self.keys, self.values = k, v

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values for a decoding step."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


class CrossAttentionBlock(nn.Module):
    """h = x + tanh(g) * attention(norm(x), vision); h + tanh(g') * ffn(norm(h)).

    Tokens that attend to nothing get neither branch. Source: Llama 3.2 reference.
    """

    def __init__(self, config: LanguageModelConfig, intermediate_size: int, gate_init: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.cross_attn = CrossAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, intermediate_size)
        self.gate_attn = nn.Parameter(torch.full((1,), float(gate_init)))
        self.gate_ffn = nn.Parameter(torch.full((1,), float(gate_init)))
        if gate_init != 0:
            nn.init.zeros_(self.cross_attn.o_proj.weight)
            nn.init.zeros_(self.mlp.down_proj.weight)

    def forward(
        self, x: Tensor, mask: CrossAttentionMask, vision: Tensor | None = None, cache: VisionCache | None = None
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D], in the weights' precision; rows without images are unchanged.

        Args:
            mask: which vision tokens each text token attends to.
            vision: projected vision tokens of the batch's different images, packed, [N, D], whose keys and values are
                computed once for all rows; None: keys and values come from the cache. Their gradient is summed in their
                own precision, which may be higher than the weights'.
            cache: filled where `vision` is given, read where it is not.
        """
        x = x.to(self.input_layernorm.weight.dtype)
        if vision is not None:
            k, v = (mask.gather_rows(packed).transpose(1, 2) for packed in self.cross_attn.keys_values(vision))
            if cache is not None:
                cache.fill(k, v)
        else:
            assert cache is not None
            k, v = cache.read()
        rows = x if mask.rows is None else x[mask.rows]
        attended = self.cross_attn(self.input_layernorm(rows), k, v, mask.attention_mask)
        rows = rows + self.gate_attn.tanh() * mask.zero_unattended(attended)
        transformed = self.mlp(self.post_attention_layernorm(rows))
        rows = rows + self.gate_ffn.tanh() * mask.zero_unattended(transformed)
        return rows if mask.rows is None else x.index_copy(0, mask.rows, rows)

    def is_identity(self) -> bool:
        """Whether both branches are closed, as in a new block: by their gates or by matrices of zeros."""
        branches = ((self.gate_attn, self.cross_attn.o_proj.weight), (self.gate_ffn, self.mlp.down_proj.weight))
        return not any(bool(read(gate).any()) and bool(read(matrix).any()) for gate, matrix in branches)

    @torch.no_grad()
    def fit_inputs(
        self,
        x: Tensor,
        before_answer: Tensor,
        is_text: Tensor,
        mask: CrossAttentionMask,
        vision: Tensor,
        seed: int,
        name: str,
    ) -> None:
        """Initialise the norms, the attention's output and the feed-forward from the states that the block will read.

        A few channels of a language model's hidden states are a hundred times larger than the others, and before an
        answer the states are nearly equal whatever the question. Answers that depend on question and picture together,
        such as yes or no, are then learnt late or never. So

        - the norms divide each channel by its root mean square over the tokens that attend to images;
        - where the gate is open, `o_proj` is drawn at random, without the part that is equal for all pictures, and so
          large that before an answer pictures differ in each channel as much as the states do: from zeros, the
          feed-forward would learn for a long time without a picture;
        - the feed-forward's first matrices drop the direction of the mean state before an answer, and are scaled so
          that the differences there drive SwiGLU.

        Args:
            x, mask, vision: as in `forward`.
            before_answer: bool [B, T], the tokens before an answer. is_text: bool [B, T], those that are not padding.
            seed, name: of the draw; the name is the block's in its model.
        """
        if mask.rows is not None:
            x, before_answer, is_text = x[mask.rows], before_answer[mask.rows], is_text[mask.rows]
        x = x.float()
        is_read = is_text if mask.attending is None else is_text & mask.attending[..., 0]
        before_answer = before_answer & is_read
        if not before_answer.any():  # all images come after the answers
            before_answer = is_read
        self.input_layernorm.weight.copy_(_channel_scales(x[is_read]))
        if bool(self.gate_attn):
            matrix = draw(Normal(1.0), self.cross_attn.o_proj.weight.shape, seed, f"{name}.cross_attn.o_proj.weight")
            x = x + self._fit_output(x, before_answer, mask, vision, matrix.to(x))
        self.post_attention_layernorm.weight.copy_(_channel_scales(x[is_read]))
        normed = self.post_attention_layernorm(x[before_answer])
        direction = nn.functional.normalize(normed.mean(0), dim=0)
        for matrix in (self.mlp.gate_proj.weight, self.mlp.up_proj.weight):
            centred = matrix - torch.outer(matrix @ direction, direction)
            spread = (normed @ centred.T).var(0, correction=0).mean().sqrt()
            matrix.copy_(centred * (TARGET_STD / spread.clamp(min=1 / MAX_SCALE)))

    def _fit_output(
        self, x: Tensor, before_answer: Tensor, mask: CrossAttentionMask, vision: Tensor, matrix: Tensor
    ) -> Tensor:
        """Set `o_proj` and return what the attention then adds to x; see `fit_inputs`. Args: matrix: random numbers."""
        k, v = (mask.gather_rows(packed).transpose(1, 2) for packed in self.cross_attn.keys_values(vision))
        normed = self.input_layernorm(x)
        heads = self.cross_attn.heads(normed, k, v, mask.attention_mask)
        read, states = heads[before_answer], normed[before_answer]
        spread = (states - states.mean(0)).square().mean().sqrt()
        direction = nn.functional.normalize(read.mean(0), dim=0)
        matrix = matrix - torch.outer(matrix @ direction, direction)
        # What it writes, in the units of the normalised states, in which the norms' scales cancel.
        unit = self.gate_attn.tanh() / x[before_answer].square().mean(-1, keepdim=True).sqrt()
        written = unit * (read @ matrix.T)
        size = (written - written.mean(0)).square().mean().sqrt()
        smallest = (unit * read.norm(dim=-1, keepdim=True)).mean() * MIN_DIFFERENCE
        matrix = matrix / self.input_layernorm.weight[:, None]
        self.cross_attn.o_proj.weight.copy_(matrix * (spread / torch.maximum(size, smallest).clamp(min=1e-6)))
        return self.gate_attn.tanh() * mask.zero_unattended(self.cross_attn.o_proj(heads))


def _channel_scales(states: Tensor) -> Tensor:
    """The weights with which an RMSNorm gives every channel of these states, [N, D], a root mean square of 1."""
    return nn.functional.rms_norm(states, states.shape[-1:]).square().mean(0).rsqrt().clamp(max=MAX_SCALE)


class ImageAdapter(nn.Module):
    """The projection, shared by all blocks, and the blocks in the order in which they run."""

    def __init__(self, config: ImageAdapterConfig, language_model: LanguageModelConfig, feature_size: int) -> None:
        super().__init__()
        self.positions = config.block_positions(language_model.num_layers)
        width = config.intermediate_size or language_model.intermediate_size
        self.projection = Linear(feature_size, language_model.hidden_size)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(language_model, width, config.gate_init) for _ in self.positions
        )

    def by_position(self) -> dict[int, CrossAttentionBlock]:
        """The blocks by the number of LM layers before them; on a pipeline's rank, only those of its stage."""
        pairs = zip(self.positions, self.blocks, strict=True)
        return {position: block for position, block in pairs if isinstance(block, CrossAttentionBlock)}

    def is_identity(self) -> bool:
        """Whether no block changes what it reads, as in a new adapter."""
        return all(block.is_identity() for block in self.by_position().values())
