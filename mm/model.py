"""The whole forward pass, in one file: a frozen language model with eyes and ears.

    images -> vision_encoder -> projection -> vision tokens (once)
    clips -> vision_encoder -> video_adapter.aggregator -> vision tokens of their own (once)
    utterances -> speech_encoder -> speech_adapter (-> readout) -> rows of the language model's input
    tokens -> embedding -> LM layers, with cross-attention blocks between them at the adapters' positions -> logits

Shapes: B rows, T text tokens, V vocabulary, D width of the language model, S vision tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from layers.attention import DecodeStep, KeyValueCache
from mm.batch import IGNORED, Batch, CrossAttentionMask, VisionContext, visibility_intervals
from mm.config import NUM_EXTRA_TOKENS, ModelConfig
from mm.cross_attention import CrossAttentionBlock, ImageAdapter, VisionCache
from mm.language_model import LanguageModel
from mm.video_adapter import VideoAdapter
from speech.adapter import SpeechAdapter, num_tokens
from speech.conformer import SpeechEncoder
from speech.ctc_readout import read_out, token_scores
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from video.sampling import Clip
from vision.encoder import VisionEncoder

VisionContexts = dict[
    str, VisionContext
]  # what is there to be seen: of "image", of "video"; nothing of what a batch does not hold


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
        self.vision = {place: VisionCache() for place in model.blocks()}
        self.contexts: VisionContexts = {}  # what the last token of each row sees
        self.audio_embeddings: Tensor | None = (
            None  # what the adapter made of the utterances, before any readout, packed [N, D]
        )


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
        self.video_adapter = None
        if config.video_adapter:
            self.video_adapter = VideoAdapter(
                config.video_adapter, config.language_model, self.image_adapter.positions, feature_size
            )
        self.speech_encoder = self.speech_adapter = None
        if config.speech_encoder:
            kind = WhisperEncoder if isinstance(config.speech_encoder, WhisperEncoderConfig) else SpeechEncoder
            self.speech_encoder = kind(config.speech_encoder)
            self.speech_adapter = SpeechAdapter(
                config.speech_adapter, config.speech_encoder.output_width, config.language_model.hidden_size
            )
        # Inputs that the LM's own table lacks. Frozen: training an input row would send the backward pass down to the
        # first layer, while it otherwise ends at the first block.
        width = config.language_model.hidden_size
        self.extra_embeddings = nn.Parameter(torch.randn(NUM_EXTRA_TOKENS, width) * 0.02, requires_grad=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every token, [B, T, V]; what stands behind a row's length is padding.

        Raises:
            UserError: see `hidden_states`.
        """
        return self.language_model.lm_head(self.hidden_states(batch))

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The last hidden states, normalised, [B, T, D]; the language model's `lm_head` turns them into logits.

        Args:
            cache: filled on the way, for `decode` to go on from.

        Raises:
            UserError: placeholders that do not match images, clips and utterances, a token outside the vocabulary,
                text longer than the context, or something to see or hear for a model without eyes or ears.
        """
        self._check(batch)
        seen = self.vision_contexts(batch, cache)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        x = self.run_layers(
            self.insert_audio_embeddings(self.embed(batch.tokens), batch, cache), positions, seen, cache
        )
        return self.language_model.model.norm(x)

    def decode(self, tokens: Tensor, positions: Tensor, step: DecodeStep, cache: Cache) -> Tensor:
        """Logits [B, V] after one more token per row, [B, 1], at `positions` ([1] or [B, 1]).

        New tokens go on seeing what the last token of their row's prompt saw.
        """
        x = self.run_layers(self.embed(tokens), positions, cache.contexts, cache, step)
        return self.language_model.lm_head(self.language_model.model.norm(x)[:, -1])

    @torch.no_grad()
    def fit_inputs(self, batch: Batch, kind: str = "image") -> None:
        """Start the image adapter's blocks, or the "video" adapter's, from the hidden states before the answers of
        `batch`; see `CrossAttentionBlock.fit_inputs`.

        Raises:
            UserError: a batch without targets.
        """
        if batch.labels is None:
            raise UserError("fit_inputs is given samples without targets; it needs the tokens before some answers")
        targets = batch.labels != IGNORED
        asked = nn.functional.pad(targets[:, 1:] & ~targets[:, :-1], (0, 1))  # the next token begins an answer
        hooks = [
            block.register_forward_pre_hook(lambda block, inputs: block.fit_inputs(inputs[0][asked]))
            for (_, looks_at), block in self.blocks().items()
            if looks_at == kind
        ]
        try:
            self.hidden_states(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., D], from the frozen table and the extra rows behind it."""
        table = self.language_model.model.embed_tokens
        extra = tokens - self.config.language_model.vocab_size
        embedded = table(torch.where(extra < 0, tokens, 0))
        return torch.where(extra[..., None] < 0, embedded, self.extra_embeddings[extra.clamp(min=0)].to(embedded.dtype))

    def ctc_blank(self, device: torch.device) -> Tensor:
        """The token whose embedding CTC has for hearing nothing new, [1]: the audio token itself."""
        return torch.tensor([self.config.audio_token_id], device=device)

    def blocks(self) -> dict[tuple[int, str], CrossAttentionBlock]:
        """Each cross-attention block that is held here, under the number of LM layers before it and what it sees."""
        adapters = (("video", self.video_adapter), ("image", self.image_adapter))
        return {
            (depth, kind): block
            for kind, adapter in adapters
            if adapter is not None
            for depth, block in adapter.by_position().items()
        }

    def run_layers(
        self,
        x: Tensor,
        positions: Tensor,
        seen: VisionContexts,
        cache: Cache | None = None,
        step: DecodeStep | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Embedded tokens [B, T, D] through every layer and block, or through a range of layers and the blocks that are
        held there -> [B, T, D]."""
        decoder = self.language_model.model
        layers = layers or range(len(decoder.layers))
        blocks = self.blocks()
        rotary = self.language_model.angles(positions, x.dtype)
        for depth in range(layers.start, layers.stop + 1):
            for kind in ("video", "image"):  # at the same depth the clip's block comes first (paper §7.3)
                if kind in seen and (depth, kind) in blocks:
                    kept = cache.vision[depth, kind] if cache else None
                    x = blocks[depth, kind](x, seen[kind].visible, seen[kind].tokens, kept)
            if depth < layers.stop:
                x = decoder.layers[depth](x, rotary, cache.layers[depth] if cache else None, step)
        return x

    def vision_contexts(self, batch: Batch, cache: Cache | None) -> VisionContexts:
        """The vision tokens of what the batch holds, and who sees them."""
        encoder, seen = self.vision_encoder, {}
        if batch.images:
            counts = [encoder.num_vision_tokens(tiles) for tiles in batch.images]
            vision = self.image_adapter.projection(encoder(batch.images))
            # Every block uses the vision tokens, so their gradient is summed in the type they have here: FP32, also
            # where autocast gives bf16.
            vision = vision.to(self.image_adapter.projection.weight.dtype)
            seen["image"] = self._sight("image", counts, vision, batch, cache)
        if batch.videos:
            vision = self._encode_videos(batch.videos)
            vision = vision.to(self.video_adapter.aggregator.output.weight.dtype)  # likewise
            seen["video"] = self._sight("video", self.clip_sizes(batch.videos), vision, batch, cache)
        return seen

    def _sight(
        self, kind: str, counts: Sequence[int], vision: Tensor, batch: Batch, cache: Cache | None
    ) -> VisionContext:
        """Args: counts: vision tokens of each image, or of each clip, of the batch."""
        host, device, (token_id, per_row) = batch.host, batch.tokens.device, self._placed(batch)[kind]
        ends = torch.tensor([0, *counts]).cumsum(0)
        rows = torch.tensor([0, *per_row]).cumsum(0)
        counts_per_row = ends[rows].diff().tolist()
        intervals = visibility_intervals(_found(host, token_id), per_row, counts)
        if cache is not None:
            last = intervals[torch.arange(len(intervals), device=intervals.device), host.lengths - 1]
            cache.contexts[kind] = VisionContext(CrossAttentionMask(last[:, None], counts_per_row, device))
        return VisionContext(CrossAttentionMask(intervals, counts_per_row, device), vision)

    def encode_videos(self, clips: Sequence[Clip]) -> Tensor:
        """Clips -> the vision tokens of their effective frames, packed: [N, D], N the sum of `clip_sizes`."""
        return self._encode_videos(clips)

    def _encode_videos(self, clips: Sequence[Clip]) -> Tensor:
        # Within a pass of the whole model no other one may begin: where weights are sharded, its end gives them back.
        return self.video_adapter(clips, self.vision_encoder)

    def clip_sizes(self, clips: Sequence[Clip]) -> list[int]:
        """The number of vision tokens of each clip."""
        groups = self.config.video_adapter.aggregator.num_groups
        return [groups(len(clip.frames)) * self.vision_encoder.num_vision_tokens(clip.frames[0]) for clip in clips]

    def encode_audio(self, speech: Sequence[Tensor]) -> Tensor:
        """Utterances, each float32 [T, num_mels] -> what the adapter makes of them, before any readout, packed: [N, D],
        N the sum of `speech.adapter.num_tokens(T)`."""
        return self._encode_audio(speech)

    def _encode_audio(self, speech: Sequence[Tensor]) -> Tensor:  # apart for the reason that `_encode_videos` is
        # What is longer than the encoder takes is cut; the pieces' tokens follow each other.
        pieces = [piece for mel in speech for piece in mel.split(self.config.speech_encoder.max_mel_frames)]
        lengths = torch.tensor([len(piece) for piece in pieces])
        heard, counts = self.speech_adapter(*self.speech_encoder(pad_sequence(pieces, batch_first=True), lengths))
        return torch.cat([row[:count] for row, count in zip(heard, counts.tolist(), strict=True)])

    def audio_token_scores(self, heard: Tensor) -> tuple[Tensor, Tensor]:
        """What rows as `hear` gives them, [N, D], say by themselves: see `speech.ctc_readout.token_scores`; for
        adapters with a readout."""
        return token_scores(heard, *self._ctc_embeddings())

    def _ctc_embeddings(self) -> tuple[Tensor, Tensor]:
        """The embeddings that a readout finds in rows, and that of the blank."""
        device = self.extra_embeddings.device
        return self.language_model.model.embed_tokens.weight, self.embed(self.ctc_blank(device))[0]

    def insert_audio_embeddings(self, x: Tensor, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Embedded tokens [B, T, D], with what is heard in the audio tokens' rows and the adapter's marks around it."""
        if not batch.speech:
            return x
        packed = self._encode_audio(batch.speech)
        if cache is not None:
            cache.audio_embeddings = packed
        if self.config.speech_adapter.readout:
            lengths = torch.tensor([num_tokens(len(mel)) for mel in batch.speech])
            packed = read_out(packed, lengths, *self._ctc_embeddings(), rest=self.speech_adapter.boundaries[1])
        rows, columns = (
            places.to(x.device, non_blocking=True)
            for places in _found(batch.host, self.config.audio_token_id).nonzero(as_tuple=True)
        )
        x = x.to(packed.dtype).index_put((rows, columns), packed)
        marks = (self.config.speech_start_id, self.config.speech_end_id)
        for token_id, mark in zip(marks, self.speech_adapter.boundaries, strict=True):
            x = torch.where((batch.tokens == token_id)[..., None], mark, x)
        return x

    def _placed(self, batch: Batch) -> dict[str, tuple[int, list[int]]]:
        """Of each kind of thing that stands in the text as one token: the token, and how many each row has."""
        placed = {"image": (self.config.image_token_id, batch.images_per_row)}
        if self.video_adapter is not None:
            placed["video"] = (self.config.video_token_id, batch.videos_per_row or [0] * len(batch.tokens))
        return placed

    def _check(self, batch: Batch) -> None:
        config, batch = self.config, batch.host
        if batch.images and self.vision_encoder is None:
            raise UserError("the batch holds images and the model has no vision_encoder")
        if batch.videos and self.video_adapter is None:
            raise UserError("the batch holds clips and the model has no video_adapter")
        if batch.speech and self.speech_encoder is None:
            raise UserError("the batch holds speech and the model has no speech_encoder")
        if batch.tokens.shape[1] > config.language_model.context:
            raise UserError(
                f"the text has {batch.tokens.shape[1]} tokens; the language model's context is "
                f"{config.language_model.context}: shorten it"
            )
        limit = config.language_model.vocab_size + NUM_EXTRA_TOKENS
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= limit:
            raise UserError(f"token {low if low < 0 else high} lies outside the vocabulary, 0..{limit - 1}")
        for kind, (token_id, per_row) in self._placed(batch).items():
            placeholders = _found(batch, token_id).sum(1).tolist()
            for row, (found, given) in enumerate(zip(placeholders, per_row, strict=True)):
                if found != given:
                    raise UserError(
                        f"row {row} has {found} {kind} tokens (id {token_id}) and {given} {kind}s; "
                        f"put one token where each {kind} stands"
                    )
        if self.speech_encoder is None:
            return
        mels = iter(batch.speech)
        found = _found(batch, config.audio_token_id).sum(1).tolist()
        for row, number in enumerate(batch.speech_per_row or [0] * len(batch.tokens)):
            needed = sum(num_tokens(len(next(mels))) for _ in range(number))
            if found[row] != needed:
                raise UserError(
                    f"row {row} has {found[row]} audio tokens (id {config.audio_token_id}) and {number} utterances, "
                    f"which take {needed}: speech.adapter.num_tokens(T) each"
                )


def _found(batch: Batch, token_id: int) -> Tensor:
    """Where a token stands within the rows' lengths: bool [B, T]."""
    real = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
    return (batch.tokens == token_id) & real
