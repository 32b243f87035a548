"""The whole forward pass, in one file: a frozen language model with eyes and ears.

    images -> vision_encoder -> projection -> vision tokens (once)
    clips -> vision_encoder -> video_adapter.aggregator -> vision tokens of their own (once)
    utterances -> speech_encoder -> speech_adapter (-> CTC readout) -> rows of the language model's input
    tokens -> embedding -> LM layers, with cross-attention blocks between them at the adapters' positions -> logits

Shapes: B rows, T text tokens, V vocabulary, D width of the language model, S vision tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from layers.attention import DecodeStep, KeyValueCache
from mm.batch import IGNORED, Batch
from mm.config import NUM_EXTRA_TOKENS, ModelConfig
from mm.cross_attention import CrossAttentionBlock, ImageAdapter, VisionCache
from mm.language_model import DecoderLayer, LanguageModel
from mm.modalities import AUDIO, IMAGE, MODALITIES, VIDEO, Modality
from mm.video_adapter import VideoAdapter
from mm.vision_context import CrossAttentionMask, VisionContext, VisionContexts, visibility_intervals
from speech.adapter import SpeechAdapter, num_tokens
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.ctc_readout import ctc_compress, ctc_log_probs
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from video.sampling import Clip
from vision.encoder import VisionEncoder
from vision.tiling import Tiles


class Cache:
    """What a pass leaves for further tokens: keys and values of the text per layer, of the vision tokens per block.

    Args:
        model: gives shapes, device and dtype.
        num_rows: rows of the batch.
        length: tokens of the longest sequence, prompt and answer.

    Attributes:
        layers: keys and values of each LM layer that the process holds, by its index.
        vision: keys and values of each cross-attention block, by depth and modality.
        contexts: which vision tokens the last token of each row's prompt attends to.
    """

    def __init__(self, model: "MultimodalModel", num_rows: int, length: int) -> None:
        config, weight = model.config.language_model, model.language_model.model.norm.weight
        shape = (num_rows, model.num_kv_heads, length, config.head_dim)
        self.layers = {
            depth: KeyValueCache(weight.new_zeros(shape), weight.new_zeros(shape)) for depth in model.held_layers()
        }
        self.vision = {key: VisionCache() for key in model.blocks()}
        self.contexts: VisionContexts = {}


class MultimodalModel(nn.Module):
    """A language model, encoders and adapters; a part that the configuration leaves out is None.

    Args:
        config: shapes of all parts. Weights start at random; `mm.load` and `mm.convert` bring real ones.
    """

    report: object = None  # a converter's LoadingReport
    mllama_source: object = None  # the folder that mm.convert.mllama read it from

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config.language_model)
        self.vision_encoder: VisionEncoder | None = None
        self.image_adapter: ImageAdapter | None = None
        self.video_adapter: VideoAdapter | None = None
        self.speech_encoder: SpeechEncoder | WhisperEncoder | None = None
        self.speech_adapter: SpeechAdapter | None = None
        if config.vision_encoder and config.image_adapter:
            self.vision_encoder = VisionEncoder(config.vision_encoder)
            feature_size = config.vision_encoder.feature_size
            self.image_adapter = ImageAdapter(config.image_adapter, config.language_model, feature_size)
            if config.video_adapter:
                self.video_adapter = VideoAdapter(
                    config.video_adapter, config.language_model, self.image_adapter.positions, feature_size
                )
        if config.speech_encoder and config.speech_adapter:
            self.speech_encoder = build_speech_encoder(config.speech_encoder)
            self.speech_adapter = SpeechAdapter(
                config.speech_adapter, config.speech_encoder.output_width, config.language_model.hidden_size
            )
        # Inputs that the LM's own table lacks. Frozen: training an input row would send the backward pass down to the
        # first layer, while it otherwise ends at the first block.
        width = config.language_model.hidden_size
        self.extra_embeddings = nn.Parameter(
            nn.init.normal_(torch.empty(NUM_EXTRA_TOKENS, width), std=0.02), requires_grad=False
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits of every token, [B, T, V]; those beyond a row's length are padding.

        Raises:
            UserError: see `hidden_states`.
        """
        return self.language_model.lm_head(self.hidden_states(batch))

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The last hidden states, normalised, [B, T, D]; the language model's `lm_head` turns them into logits.

        Args:
            cache: filled on the way, for `run_layers` to continue from.

        Raises:
            UserError: placeholders that do not match the batch's items, a token outside the vocabulary, text longer
                than the context, or items of a modality whose parts the model lacks.
        """
        self.check_batch(batch)
        contexts = self.vision_contexts(batch, cache)
        x = self.insert_audio_embeddings(self.embed(batch.tokens), batch)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return self.language_model.model.norm(self.run_layers(x, positions, contexts, cache))

    @torch.no_grad()
    def fit_inputs(self, batch: Batch, kind: str = "image", seed: int = 0) -> None:
        """Initialise an adapter's blocks from the hidden states before the batch's answers.

        See `CrossAttentionBlock.fit_inputs`.

        Args:
            kind: the adapter's modality, "image" or "video".
            seed: of the draws.

        Raises:
            UserError: a batch without targets, or without items of the modality.
        """
        if batch.labels is None:
            raise UserError("fit_inputs is given samples without targets; it needs the tokens before some answers")
        modality = next(modality for modality in MODALITIES if modality.name == kind)
        if not batch.items(modality):
            raise UserError(
                f"fit_inputs is given {len(batch.tokens)} samples without {modality.plural}: set the adapter's "
                f"fit_inputs to false, or give data of which more records hold {modality.plural}"
            )
        targets = batch.labels != IGNORED
        before_answer = nn.functional.pad(targets[:, 1:] & ~targets[:, :-1], (0, 1))
        is_text = torch.arange(targets.shape[1], device=targets.device) < batch.lengths[:, None]
        hooks = [
            block.register_forward_pre_hook(
                lambda block, inputs, depth=depth: block.fit_inputs(
                    inputs[0], before_answer, is_text, *inputs[1:3], seed, f"{modality.name}_adapter.{depth}"
                )
            )
            for (depth, block_kind), block in self.blocks().items()
            if block_kind == kind
        ]
        try:
            self.hidden_states(batch)
        finally:
            for hook in hooks:
                hook.remove()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., D], from the frozen table and the extra rows behind it, in the type of the latter."""
        table = self.language_model.model.embed_tokens
        extra = tokens - self.config.language_model.vocab_size
        embedded = table(torch.where(extra < 0, tokens, 0)).to(self.extra_embeddings.dtype)
        return torch.where(extra[..., None] < 0, embedded, self.extra_embeddings[extra.clamp(min=0)])

    def ctc_blank(self, device: torch.device) -> Tensor:
        """The token whose embedding stands for CTC's blank, [1]: the audio token."""
        return torch.tensor([self.config.audio_token_id], device=device)

    def held_layers(self) -> dict[int, DecoderLayer]:
        """The language model's layers that this process holds, by their index; a pipeline's rank has only some."""
        layers = self.language_model.model.layers
        return {depth: layer for depth, layer in enumerate(layers) if isinstance(layer, DecoderLayer)}

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer that this process holds; tensor-parallel ranks share those of the configuration."""
        k_proj = next(iter(self.held_layers().values())).self_attn.k_proj
        return k_proj.out_features // self.config.language_model.head_dim

    def blocks(self) -> dict[tuple[int, str], CrossAttentionBlock]:
        """The cross-attention blocks that this process holds, by the number of LM layers before them and modality."""
        adapters: tuple[tuple[str, VideoAdapter | ImageAdapter | None], ...]
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
        contexts: VisionContexts,
        cache: Cache | None = None,
        step: DecodeStep | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """Embedded tokens [B, T, D] through the LM layers and the blocks between them -> [B, T, D].

        Args:
            layers: those to run, with the blocks that this process holds; None runs all.
        """
        decoder = self.language_model.model
        layers = layers or range(len(decoder.layers))
        blocks = self.blocks()
        rotary = self.language_model.angles(positions, x.dtype)
        for depth in range(layers.start, layers.stop + 1):
            for kind in ("video", "image"):  # at the same depth the clip's block comes first (paper §7.3)
                if kind in contexts and (depth, kind) in blocks:
                    keys_values = cache.vision[depth, kind] if cache else None
                    x = blocks[depth, kind](x, contexts[kind].mask, contexts[kind].tokens, keys_values)
            if depth < layers.stop:
                x = decoder.layers[depth](x, rotary, cache.layers[depth] if cache else None, step)
        return x

    def vision_contexts(self, batch: Batch, cache: Cache | None) -> VisionContexts:
        """The vision tokens of the batch's images and clips, and which of them each text token attends to."""
        contexts: VisionContexts = {}
        if batch.images:
            assert self.vision_encoder is not None
            sizes = [self.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images]
            contexts["image"] = self._context(IMAGE, self._encode_images(batch.images), sizes, batch, cache)
        if batch.videos:
            sizes = self.clip_sizes(batch.videos)
            contexts["video"] = self._context(VIDEO, self._encode_videos(batch.videos), sizes, batch, cache)
        return contexts

    def _context(
        self, modality: Modality, vision: Tensor, sizes: Sequence[int], batch: Batch, cache: Cache | None
    ) -> VisionContext:
        """Args: vision: of the batch's different items, packed, [N, D]. sizes: vision tokens of each of them."""
        host, device, row_items = batch.host, batch.tokens.device, batch.row_items(modality)
        spans = torch.arange(sum(sizes)).split(list(sizes))
        positions = [torch.cat([spans[item] for item in items]) if items else spans[0][:0] for items in row_items]
        intervals = visibility_intervals(
            _is_token(host, modality.token_id(self.config)), [[sizes[item] for item in items] for items in row_items]
        )
        if cache is not None:
            last = intervals[torch.arange(len(intervals), device=intervals.device), host.lengths - 1]
            cache.contexts[modality.name] = VisionContext(CrossAttentionMask(last[:, None], positions, device))
        return VisionContext(CrossAttentionMask(intervals, positions, device), vision)

    def encode_images(self, images: Sequence[Tiles]) -> Tensor:
        """Images -> their vision tokens, packed, [N, D].

        For losses outside `hidden_states`: under FSDP a method that callers use directly gathers the weights and frees
        them when it returns. Within the model's own pass the private twin runs, which leaves them gathered.
        """
        return self._encode_images(images)

    def _encode_images(self, images: Sequence[Tiles]) -> Tensor:
        assert self.vision_encoder is not None and self.image_adapter is not None
        vision = self.image_adapter.projection(self.vision_encoder(images))
        # Every block uses the vision tokens, so their gradient is summed in the type they have here: FP32, also
        # where autocast gives bf16.
        return vision.to(self.image_adapter.projection.weight.dtype)

    def encode_videos(self, clips: Sequence[Clip]) -> Tensor:
        """Clips -> the vision tokens of their effective frames, packed: [N, D], N the sum of `clip_sizes`.

        Apart from its private twin for the reason in `encode_images`.
        """
        return self._encode_videos(clips)

    def _encode_videos(self, clips: Sequence[Clip]) -> Tensor:
        assert self.vision_encoder is not None and self.video_adapter is not None
        vision = self.video_adapter(clips, self.vision_encoder)
        return vision.to(self.video_adapter.aggregator.output.weight.dtype)  # as in `_encode_images`

    def clip_sizes(self, clips: Sequence[Clip]) -> list[int]:
        """The number of vision tokens of each clip."""
        assert self.vision_encoder is not None and self.config.video_adapter is not None
        groups = self.config.video_adapter.aggregator.num_groups
        return [groups(len(clip.frames)) * self.vision_encoder.num_vision_tokens(clip.frames[0]) for clip in clips]

    def encode_audio(self, speech: Sequence[Tensor]) -> Tensor:
        """Utterances, each float32 [T, num_mels] -> the adapter's output before any readout, packed: [N, D].

        N is the sum of `speech.adapter.num_tokens(T)`. Apart from its private twin for the reason in `encode_images`.
        """
        return self._encode_audio(speech)

    def _encode_audio(self, speech: Sequence[Tensor]) -> Tensor:
        assert self.config.speech_encoder is not None and self.speech_encoder is not None
        assert self.speech_adapter is not None
        # An utterance longer than the encoder's limit is cut; the pieces' tokens follow each other.
        pieces = [piece for mel in speech for piece in mel.split(self.config.speech_encoder.max_mel_frames)]
        lengths = torch.tensor([len(piece) for piece in pieces])
        embedded, counts = self.speech_adapter(*self.speech_encoder(pad_sequence(pieces, batch_first=True), lengths))
        return torch.cat([row[:count] for row, count in zip(embedded, counts.tolist(), strict=True)])

    def audio_token_scores(self, audio_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """CTC's log-probabilities of the rows of `encode_audio`, [N, D]; see `speech.ctc_readout.ctc_log_probs`."""
        return ctc_log_probs(audio_embeddings, *self._ctc_embeddings())

    def _ctc_embeddings(self) -> tuple[Tensor, Tensor]:
        """The embeddings of CTC's labels, [vocabulary, D], and that of its blank, [D]."""
        device = self.extra_embeddings.device
        return self.language_model.model.embed_tokens.weight, self.embed(self.ctc_blank(device))[0]

    def insert_audio_embeddings(self, x: Tensor, batch: Batch) -> Tensor:
        """Embedded tokens [B, T, D], with utterances at the audio tokens and the adapter's marks around them."""
        if not batch.speech:
            return x
        places = _is_token(batch.host, AUDIO.token_id(self.config)).nonzero(as_tuple=True)
        return self.place_audio(
            x, batch.tokens, self.audio_inputs(self._encode_audio(batch.speech), batch.speech), places
        )

    def audio_inputs(self, encoded: Tensor, speech: Sequence[Tensor]) -> Tensor:
        """What stands at the audio tokens of utterances, packed [N, D]: `encode_audio`'s rows, or CTC's readout."""
        assert self.speech_adapter is not None and self.config.speech_adapter is not None
        if not self.config.speech_adapter.ctc_readout:
            return encoded
        lengths = torch.tensor([num_tokens(len(mel)) for mel in speech])
        return ctc_compress(encoded, lengths, *self._ctc_embeddings(), rest=self.speech_adapter.boundaries[1])

    def place_audio(self, x: Tensor, tokens: Tensor, audio: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        """Embedded tokens [B, T, D] with `audio_inputs` at `places` (rows, columns) and the marks around them."""
        assert self.speech_adapter is not None
        rows, columns = (indices.to(x.device, non_blocking=True) for indices in places)
        x = x.to(audio.dtype).index_put((rows, columns), audio)
        marks = (self.config.speech_start_id, self.config.speech_end_id)
        for token_id, mark in zip(marks, self.speech_adapter.boundaries, strict=True):
            x = torch.where((tokens == token_id)[..., None], mark, x)
        return x

    def check_batch(self, batch: Batch) -> None:
        """Check that a batch fits the model, without running it.

        Raises:
            UserError: see `hidden_states`.
        """
        config, batch = self.config, batch.host
        for modality in MODALITIES:
            if batch.items(modality) and getattr(self, modality.part) is None:
                raise UserError(f"the batch holds {modality.plural} and the model has no {modality.part}")
        if batch.tokens.shape[1] > config.language_model.context:
            raise UserError(
                f"the text has {batch.tokens.shape[1]} tokens; the language model's context is "
                f"{config.language_model.context}: shorten it"
            )
        limit = config.language_model.vocab_size + NUM_EXTRA_TOKENS
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= limit:
            raise UserError(f"token {low if low < 0 else high} lies outside the vocabulary, 0..{limit - 1}")
        for modality in MODALITIES:
            # Released models place images by a token of their own; other placeholders of absent parts are plain tokens.
            if modality is IMAGE or getattr(self, modality.part) is not None:
                self._check_placeholders(batch, modality)

    def _check_placeholders(self, batch: Batch, modality: Modality) -> None:
        token_id, items = modality.token_id(self.config), batch.items(modality)
        found_per_row = _is_token(batch, token_id).sum(1).tolist()
        for row, (found, indices) in enumerate(zip(found_per_row, batch.row_items(modality), strict=True)):
            needed = sum(modality.num_tokens(items[index]) for index in indices)
            if found != needed:
                raise UserError(
                    f"row {row} has {found} {modality.name} tokens (id {token_id}) and {len(indices)} "
                    f"{modality.plural}, which take {needed}: put an item's {modality.name} tokens where it stands in "
                    "the text"
                )


def build_speech_encoder(config: SpeechEncoderConfig | WhisperEncoderConfig) -> SpeechEncoder | WhisperEncoder:
    """The conformer or the Whisper encoder of a configuration, with random weights."""
    return WhisperEncoder(config) if isinstance(config, WhisperEncoderConfig) else SpeechEncoder(config)


def _is_token(batch: Batch, token_id: int) -> Tensor:
    """True at a token within the rows' lengths: bool [B, T]."""
    is_text = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.lengths[:, None]
    return (batch.tokens == token_id) & is_text
