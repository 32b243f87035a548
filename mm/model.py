"""The whole forward pass, in one file: a frozen language model with eyes.

    images -> vision_encoder -> projection -> vision tokens (once)
    tokens -> embedding -> LM layers, with a cross-attention block between them at the adapter's positions -> logits

Shapes: B rows, T text tokens, V vocabulary, D width of the language model, S vision tokens.
"""

import torch
from torch import Tensor, nn

from layers.attention import DecodeStep, KeyValueCache
from mm.batch import IGNORED, Batch, Visibility, visibility_intervals
from mm.config import NUM_EXTRA_TOKENS, ModelConfig
from mm.cross_attention import ImageAdapter, VisionCache
from mm.language_model import LanguageModel
from vision.encoder import VisionEncoder


class Cache:
    """What decoding keeps of a batch: keys and values of the text per layer, and of the images per block.

    Args:
        model: whose shapes, device and dtype it follows.
        num_rows, length: rows, and the longest sequence to come.
    """

    def __init__(self, model: "MultimodalModel", num_rows: int, length: int) -> None:
        config, weight = model.config.language_model, model.language_model.model.norm.weight
        shape = (num_rows, config.num_kv_heads, length, config.head_dim)
        self.layers = [
            KeyValueCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_layers)
        ]
        positions = model.image_adapter.positions if model.image_adapter else ()
        self.vision = {position: VisionCache() for position in positions}
        self.visible: Visibility | None = None  # what the last token of each row sees


class MultimodalModel(nn.Module):
    """A language model and the parts that stand beside it; a part that the config leaves out is None.

    Args:
        config: shapes of all parts. Weights start at random; `mm.load` and `mm.convert` bring real ones.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config.language_model)
        self.vision_encoder = VisionEncoder(config.vision_encoder) if config.vision_encoder else None
        self.image_adapter = None
        if config.image_adapter:
            feature_size = config.vision_encoder.feature_size
            self.image_adapter = ImageAdapter(config.image_adapter, config.language_model, feature_size)
        # Inputs that the LM's own table lacks. Frozen: training an input row would send the backward pass down to the
        # first layer, while it otherwise ends at the first block.
        width = config.language_model.hidden_size
        self.extra_embeddings = nn.Parameter(torch.randn(NUM_EXTRA_TOKENS, width) * 0.02, requires_grad=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every token, [B, T, V]; what stands behind a row's length is padding.

        Raises:
            ValueError: see `hidden_states`.
        """
        return self.language_model.lm_head(self.hidden_states(batch))

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The last hidden states, normalised, [B, T, D]; the language model's `lm_head` turns them into logits.

        Args:
            cache: filled on the way, for `decode` to go on from.

        Raises:
            ValueError: image tokens and images that do not match, a token outside the vocabulary, text longer than
                the context, or images for a model without eyes.
        """
        self._check(batch)
        vision, visible = self._look(batch, cache)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        x = self._walk(self.embed(batch.tokens), positions, vision, visible, cache)
        return self.language_model.model.norm(x)

    def decode(self, tokens: Tensor, positions: Tensor, step: DecodeStep, cache: Cache) -> Tensor:
        """Logits [B, V] after one more token per row, [B, 1], at `positions` ([1] or [B, 1]).

        New tokens go on seeing what the last token of their row's prompt saw.
        """
        x = self._walk(self.embed(tokens), positions, None, cache.visible, cache, step)
        return self.language_model.lm_head(self.language_model.model.norm(x)[:, -1])

    @torch.no_grad()
    def fit_inputs(self, batch: Batch) -> None:
        """Start the image adapter from the hidden states before the answers of `batch`; see
        `CrossAttentionBlock.fit_inputs`.

        Raises:
            ValueError: a batch without targets.
        """
        if batch.labels is None:
            raise ValueError("fit_inputs is given samples without targets; it needs the tokens before some answers")
        targets = batch.labels != IGNORED
        asked = nn.functional.pad(targets[:, 1:] & ~targets[:, :-1], (0, 1))  # the next token begins an answer
        blocks = self.image_adapter.blocks
        hooks = [
            block.register_forward_pre_hook(lambda block, inputs: block.fit_inputs(inputs[0][asked]))
            for block in blocks
        ]
        try:
            self.hidden_states(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> [B, T, D], from the frozen table and the extra rows behind it."""
        table = self.language_model.model.embed_tokens
        extra = tokens - self.config.language_model.vocab_size
        embedded = table(torch.where(extra < 0, tokens, 0))
        return torch.where(extra[..., None] < 0, embedded, self.extra_embeddings[extra.clamp(min=0)].to(embedded.dtype))

    def _walk(
        self,
        x: Tensor,
        positions: Tensor,
        vision: Tensor | None,
        visible: Visibility | None,
        cache: Cache | None = None,
        step: DecodeStep | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Embedded tokens [B, T, D] through every layer and block, or through a range of layers and the blocks that are
        held there -> [B, T, D]."""
        decoder = self.language_model.model
        layers = layers or range(len(decoder.layers))
        blocks = self.image_adapter.by_position() if visible is not None else {}
        rotary = self.language_model.angles(positions, x.dtype)
        for depth in range(layers.start, layers.stop + 1):
            if depth in blocks:
                x = blocks[depth](x, visible, vision, cache.vision[depth] if cache else None)
            if depth < layers.stop:
                x = decoder.layers[depth](x, rotary, cache.layers[depth] if cache else None, step)
        return x

    def _look(self, batch: Batch, cache: Cache | None) -> tuple[Tensor | None, Visibility | None]:
        """The batch's projected vision tokens [sum of S, D] and who sees them; (None, None) without images."""
        if not batch.images:
            return None, None
        counts = [self.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images]
        ends = torch.tensor([0, *counts]).cumsum(0)
        rows = torch.tensor([0, *batch.images_per_row]).cumsum(0)
        counts_per_row = ends[rows].diff().tolist()
        host, device = batch.host, batch.tokens.device
        intervals = visibility_intervals(self._is_image(host), batch.images_per_row, counts)
        if cache is not None:
            last = intervals[torch.arange(len(intervals), device=intervals.device), host.lengths - 1]
            cache.visible = Visibility(last[:, None], counts_per_row, device)
        projection = self.image_adapter.projection
        # Every block uses the vision tokens, so their gradient is summed here: in FP32, also where autocast gives bf16.
        vision = projection(self.vision_encoder(batch.images)).to(projection.weight.dtype)
        return vision, Visibility(intervals, counts_per_row, device)

    def _is_image(self, batch: Batch) -> Tensor:
        real = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
        return (batch.tokens == self.config.image_token_id) & real

    def _check(self, batch: Batch) -> None:
        config, batch = self.config, batch.host
        if batch.images and self.vision_encoder is None:
            raise ValueError("the batch holds images and the model has no vision_encoder")
        if batch.tokens.shape[1] > config.language_model.context:
            raise ValueError(
                f"the text has {batch.tokens.shape[1]} tokens; the language model's context is "
                f"{config.language_model.context}: shorten it"
            )
        limit = config.language_model.vocab_size + NUM_EXTRA_TOKENS
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= limit:
            raise ValueError(f"token {low if low < 0 else high} lies outside the vocabulary, 0..{limit - 1}")
        placeholders = self._is_image(batch).sum(1).tolist()
        for row, (found, given) in enumerate(zip(placeholders, batch.images_per_row, strict=True)):
            if found != given:
                raise ValueError(
                    f"row {row} has {found} image tokens (id {config.image_token_id}) and {given} images; "
                    "put one token where each image stands"
                )
