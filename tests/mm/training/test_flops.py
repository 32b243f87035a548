"""FLOPs and parameters computed from shapes, against PyTorch's own counter and the model itself."""

import copy
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mm
from mm.batch import IGNORED
from mm.modalities import AUDIO, IMAGE
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training import target_loss
from mm.training.character_ctc import CharacterCtcModel, CharacterCtcObjective, TranscribedUtterance
from mm.training.config import TrainingConfig
from mm.training.contrastive import ContrastiveModel, ContrastiveObjective, TextTowerConfig
from mm.training.contrastive import batch_flops as contrastive_batch_flops
from mm.training.devices import matmul_rate
from mm.training.distillation import DistillationSample
from mm.training.flops import (
    Row,
    TrainedParts,
    batch_rows,
    forward_flops,
    parameters,
    text_token_cost,
    training_flops,
)
from mm.training.matching import MatchingObjective
from mm.training.objectives import NextTokenObjective, next_token_loss
from mm.training.optimizer import apply_learning_rates
from mm.training.recomputation import activation_checkpointing
from mm.training.speech import SpeechObjective
from mm.training.speech_pretraining import BestRqObjective, SpeechPretraining, Utterance
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.whisper import WhisperEncoderConfig
from video.aggregator import AggregatorConfig
from video.sampling import Clip

FROZEN = {"language_model.*": None, "extra_embeddings": None}
BATCHES = {
    "one tile": [Row(12, 4, (1,))],
    "ragged": [Row(9, 2, (1,)), Row(14, 5, (4,)), Row(5, 1, (2,))],
    "several images": [Row(11, 3, (1, 2)), Row(7, 3, (4,))],
    "text beside": [Row(16, 8), Row(6, 2, (3,)), Row(9, 9 - 1)],
}


@pytest.fixture(scope="module")
def wide_config(tiny_config):
    """Wide enough for products to outweigh what is not counted."""
    language_model = replace(
        tiny_config.language_model, hidden_size=96, intermediate_size=160, num_heads=6, num_kv_heads=2, head_dim=16
    )
    return replace(tiny_config, language_model=language_model)


def samples_of(rows, config, random_tiles):
    grids = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
    side = config.vision_encoder.tile_size
    samples = []
    for number, row in enumerate(rows):
        tokens = [config.image_token_id] * len(row.tiles) + [5 + number] * (row.tokens - len(row.tiles))
        labels = [IGNORED] * (row.tokens - row.targets) + tokens[row.tokens - row.targets :]
        images = [random_tiles(number, grids[tiles], side) for tiles in row.tiles]
        samples.append(mm.Sample(tokens, labels, images))
    return samples


def convolution_backward_flops(*inputs, **outputs) -> int:
    """PyTorch's count, which takes the weight gradient of a depthwise convolution, a small one, for a dense one's."""
    groups = inputs[9]
    return 0 if groups > 1 else flop_registry[torch.ops.aten.convolution_backward](*inputs, **outputs)


convolution_backward_flops._get_raw = True  # it is called with tensors


def counted(work) -> int:
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("encoder", [True, False])
def test_operations_are_those_that_pytorch_counts(build_model, wide_config, random_tiles, name, encoder):
    rows = BATCHES[name]
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with torch.no_grad():
        forward = counted(lambda: next_token_loss(model, batch))
    assert forward_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)
    training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.all(wide_config, encoder)
    assert training_flops(wide_config, rows, trained_parts).total == pytest.approx(training, rel=0.02)
    assert training > 1.5 * forward


def test_logits_of_a_chunk_at_a_time_are_counted_twice(build_model, wide_config, random_tiles, monkeypatch):
    rows = BATCHES["several images"]
    whole = training_flops(wide_config, rows).total
    monkeypatch.setattr(target_loss, "MAX_LOGITS", wide_config.language_model.vocab_size)
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    training = counted(lambda: next_token_loss(model, batch).backward())
    assert training_flops(wide_config, rows).total == pytest.approx(training, rel=0.02)
    lm = wide_config.language_model
    again = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    assert training_flops(wide_config, rows).total == whole + again


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        ["image_adapter.blocks.1.mlp.*", "image_adapter.blocks.1.post_attention_layernorm.*"],
        ["image_adapter.blocks.0.mlp.*", "image_adapter.blocks.0.post_attention_layernorm.*"],
        ["image_adapter.blocks.1.cross_attn.*"],
        ["image_adapter.blocks.0.cross_attn.*", "image_adapter.blocks.1.mlp.*"],
        ["image_adapter.projection.*"],
        ["image_adapter.projection.*", "image_adapter.blocks.1.*"],
        ["vision_encoder.*"],
    ],
)
def test_frozen_weights_cost_fewer_flops(build_model, wide_config, random_tiles, patterns, checkpointing):
    rows = BATCHES["several images"]
    model = copy.deepcopy(build_model(wide_config))
    trained = apply_learning_rates(model, {**dict.fromkeys(patterns, 1e-3), "*": None})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with activation_checkpointing(
        model, CHECKPOINTED_MODULES, TrainingConfig(1, 1, activation_checkpointing=checkpointing)
    ):
        training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.of(trained, wide_config)
    assert training_flops(wide_config, rows, trained_parts, checkpointing).total == pytest.approx(training, rel=0.02)
    assert training < training_flops(wide_config, rows, activation_checkpointing=checkpointing).total


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("encoder", [True, False])
def test_alignment_costs_what_pytorch_counts(build_model, wide_config, random_tiles, name, encoder):
    """Images of two rows are equal: they are encoded once."""
    model = copy.deepcopy(build_model(wide_config))
    rates = {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3}
    trained = TrainedParts.of(apply_learning_rates(model, rates), wide_config)
    samples = samples_of(BATCHES[name], wide_config, random_tiles)
    batch = mm.collate([*samples, samples[-2]] if len(samples) > 1 else samples)
    objective = MatchingObjective(IMAGE, 1.0, 0.0)
    training = counted(lambda: objective.loss(model, batch).backward())
    assert objective.batch_flops(batch, wide_config, trained) == pytest.approx(training, rel=0.02)
    assert training < 0.7 * NextTokenObjective().batch_flops(batch, wide_config, trained)


def test_text_token_cost_is_the_ratio_that_pytorch_counts(build_model, wide_config, random_tiles):
    """One more tile, and sixty more tokens, counted by PyTorch."""
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})

    def operations(tokens: int, tiles: int) -> int:
        batch = mm.collate(samples_of([Row(tokens, tokens, (tiles,))], wide_config, random_tiles))
        return counted(lambda: next_token_loss(model, batch).backward())

    tile, text = operations(64, 2) - operations(64, 1), operations(124, 1) - operations(64, 1)
    expected = (text / 60) / (tile / wide_config.vision_encoder.tokens_per_tile)
    assert text_token_cost(wide_config) == pytest.approx(expected, rel=0.03)


def test_an_encoder_that_pads_computes_its_padding(build_model, wide_config, random_tiles):
    """At tiles of 56 px: 17 tokens become 24, and 1 tile 4."""
    encoder = replace(wide_config.vision_encoder, tile_size=56, padding="llama32")
    config = replace(wide_config, vision_encoder=encoder)
    rows = BATCHES["ragged"]
    model = copy.deepcopy(build_model(config))
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    training = counted(lambda: next_token_loss(model, mm.collate(samples_of(rows, config, random_tiles))).backward())
    assert training_flops(config, rows).total == pytest.approx(training, rel=0.02)


@pytest.mark.parametrize("encoder", [True, False])
def test_activation_checkpointing_counts_layers_once_more(build_model, wide_config, random_tiles, encoder):
    rows = BATCHES["text beside"]
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with activation_checkpointing(model, CHECKPOINTED_MODULES, TrainingConfig(1, 1, activation_checkpointing=True)):
        training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.all(wide_config, encoder)
    expected = training_flops(wide_config, rows, trained_parts, activation_checkpointing=True).total
    assert expected == pytest.approx(training, rel=0.02)
    assert expected > 1.1 * training_flops(wide_config, rows, trained_parts).total


@pytest.mark.parametrize("encoder", [True, False])
def test_shared_images_are_counted_once(build_model, wide_config, random_tiles, encoder):
    """Five rows look at three pictures, one of them at two."""
    shared, other, third = random_tiles(1, (1, 2)), random_tiles(2, (2, 2)), random_tiles(3)
    rows = [Row(9, 2, (2,)), Row(14, 5, (2, 4)), Row(5, 1, (2,)), Row(6, 6), Row(7, 2, (1,))]
    samples = samples_of(rows, wide_config, random_tiles)
    for sample, images in zip(samples, ([shared], [shared, other], [shared], [], [third]), strict=True):
        sample.images = images
    model, batch = copy.deepcopy(build_model(wide_config)), mm.collate(samples)
    trained = apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.of(trained, wide_config)
    assert NextTokenObjective().batch_flops(batch, wide_config, trained_parts) == pytest.approx(training, rel=0.02)


def test_batch_flops_are_those_of_its_rows(wide_config, random_tiles):
    for rows in BATCHES.values():
        batch = mm.collate(samples_of(rows, wide_config, random_tiles))
        for trained_parts in (TrainedParts.all(wide_config), TrainedParts.all(wide_config, encoder=False)):
            expected = training_flops(wide_config, rows, trained_parts).total
            assert NextTokenObjective().batch_flops(batch, wide_config, trained_parts) == expected


@pytest.mark.parametrize("frozen", [(), ("vision_encoder.",), ("text_tower.",)])
def test_operations_on_pairs_are_those_that_pytorch_counts(tiny_config, make_pairs, frozen):
    objective, text = ContrastiveObjective(), TextTowerConfig(64, 2, 4, 8, embedding_size=48)
    model = ContrastiveModel(tiny_config.vision_encoder, text)
    trained = apply_learning_rates(model, {**{f"{tower}*": None for tower in frozen}, "*": 1e-3})
    batch = objective.collate(make_pairs(4))
    training = counted(lambda: objective.loss(model, batch).backward())
    expected = contrastive_batch_flops(batch, tiny_config.vision_encoder, text, trained)
    assert expected == pytest.approx(training, rel=0.02)


def test_matmul_rate_is_that_of_the_fastest_product(monkeypatch):
    """A clock in whole seconds: each product takes 5, those that warm up 1, and the last 2."""
    ticks = iter([tick for last in (1, 5, 5, 5, 5, 1, 5, 5, 5, 2) for tick in (0, last)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert matmul_rate.__wrapped__(side=16) == 2 * 16**3 / 2
    assert next(ticks, None) is None


def test_text_alone_costs_the_language_model_once(build_model, wide_config, random_tiles):
    rows = [Row(10, 4)]
    model = build_model(wide_config)
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    forward = counted(lambda: next_token_loss(model, batch))
    assert training_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)


def test_flops_of_the_papers_encoder():
    """630M + 8 gated layers over 2,308 tokens: 4.8e12 operations for 4 tiles of 336 px."""
    flops = forward_flops(mm.preset("8b"), [Row(64, 64, (4,))])
    assert flops.vision_encoder == pytest.approx(4.8e12, rel=0.02)


def test_parameters_are_counted_by_part(wide_config):
    model = mm.MultimodalModel(wide_config)
    counts, trained = parameters(model, {**FROZEN, "vision_encoder.*": None, "*": 1e-3})
    assert TrainedParts.of(trained, wide_config) == TrainedParts.all(wide_config, encoder=False)
    assert counts["vision_encoder"].trained == 0 and counts["image_adapter"].frozen == 0
    assert counts["image_adapter"].trained == sum(p.numel() for p in model.image_adapter.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert sum(part.trained + part.frozen for part in counts.values()) == total


@pytest.fixture(scope="module")
def every_config(wide_config):
    """A model of every modality, wide enough for products to outweigh what is not counted."""
    return replace(
        wide_config,
        video_adapter=VideoAdapterConfig(AggregatorConfig(4, 48, 96, num_layers=2, num_heads=4), interval=2),
        speech_encoder=SpeechEncoderConfig(2, 48, 96, 4, kernel_size=3),
        speech_adapter=SpeechAdapterConfig(64, 96, 4),
    )


def every_sample(config, random_tiles) -> list[mm.Sample]:
    """Rows with a clip of three frames and a picture, one of six frames, two utterances, and text."""
    one, two = ([random_tiles(seed, (1, 1)) for seed in range(6)], [random_tiles(9 + n, (1, 2)) for n in range(3)])
    text = [5, 6, 7, 8, 9, 10, 11, 12]
    sound = [torch.randn(frames, 80) for frames in (90, 60)]
    spoken = [[token for mel in sound[n:] for token in AUDIO.tokens(mel, config)] for n in range(2)]
    heads = [
        ([config.video_token_id, config.image_token_id], {"videos": [clip(two)], "images": [random_tiles(20, (2, 2))]}),
        ([config.video_token_id], {"videos": [clip(one)]}),
        (spoken[0], {"speech": sound}),
        (spoken[1], {"speech": sound[1:]}),
        ([], {}),
    ]
    return [mm.Sample(head + text, [IGNORED] * len(head) + text, **media) for head, media in heads]


def clip(frames) -> Clip:
    return Clip(frames, torch.arange(len(frames), dtype=torch.float64))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        ["video_adapter.*"],
        ["video_adapter.aggregator.*", "vision_encoder.*"],
        ["video_adapter.blocks.*", "image_adapter.*"],
        ["speech_adapter.*"],
        ["speech_encoder.*"],
        ["speech_*", "vision_encoder.*", "video_adapter.*", "image_adapter.*"],
    ],
)
def test_clips_and_sound_cost_what_pytorch_counts(build_model, every_config, random_tiles, patterns, checkpointing):
    model = copy.deepcopy(build_model(every_config))
    trained = TrainedParts.of(apply_learning_rates(model, {**dict.fromkeys(patterns, 1e-3), "*": None}), every_config)
    batch = mm.collate(every_sample(every_config, random_tiles))
    settings = TrainingConfig(1, 1, activation_checkpointing=checkpointing)
    with activation_checkpointing(model, CHECKPOINTED_MODULES, settings):
        training = counted(lambda: next_token_loss(model, batch).backward())
    assert training_flops(every_config, batch_rows(batch), trained, checkpointing).total == pytest.approx(
        training, rel=0.02
    )
    if not checkpointing:
        assert NextTokenObjective().batch_flops(batch, every_config, trained) == pytest.approx(training, rel=0.02)


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 1.0, 1.0)]
)
def test_losses_of_speech_cost_what_pytorch_counts(build_model, every_config, weights):
    """CTC, next tokens and distillation; with CTC the adapter has a readout."""
    adapter = replace(every_config.speech_adapter, ctc_readout=bool(weights[0]))
    config = replace(every_config, speech_adapter=adapter)
    model, objective = copy.deepcopy(build_model(config)), SpeechObjective(*weights)
    trained = TrainedParts.of(apply_learning_rates(model, {"speech_*": 1e-3, "*": None}), config)
    samples = []
    for number in range(3):
        mel, answer = torch.randn(120 + 40 * number, 80), [20 * number + token for token in range(6)]
        audio = AUDIO.tokens(mel, config)
        sample = mm.Sample([7, *audio, *answer], [IGNORED] * (1 + len(audio)) + answer, speech=[mel])
        twin = mm.Sample([7, *answer, *answer], [IGNORED] * (1 + len(answer)) + answer)
        samples.append(DistillationSample(**vars(sample), twin=twin) if weights[2] else sample)
    batch = objective.collate(samples)
    training = counted(lambda: objective.loss(model, batch).backward())
    assert objective.batch_flops(batch, config, trained) == pytest.approx(training, rel=0.02)


def test_a_whisper_encoder_costs_what_pytorch_counts(build_model, wide_config):
    whisper = WhisperEncoderConfig(2, 48, 96, 4, max_seconds=1.0)
    config = replace(wide_config, speech_encoder=whisper, speech_adapter=SpeechAdapterConfig(64, 96, 4))
    for patterns in (["speech_*"], ["speech_adapter.*"]):
        model = copy.deepcopy(build_model(config)).train()
        rates = apply_learning_rates(model, {**dict.fromkeys(patterns, 1e-3), "*": None})
        samples = []
        for mel in (torch.randn(130, 80), torch.randn(50, 80)):
            audio = AUDIO.tokens(mel, config)
            samples.append(mm.Sample([*audio, 5, 6, 7], [IGNORED] * len(audio) + [5, 6, 7], speech=[mel]))
        batch = mm.collate(samples)
        training = counted(lambda model=model, batch=batch: next_token_loss(model, batch).backward())
        expected = NextTokenObjective().batch_flops(batch, config, TrainedParts.of(rates, config))
        assert expected == pytest.approx(training, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pretraining_of_a_speech_encoder_costs_what_pytorch_counts(checkpointing):
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(2, 48, 96, 4, kernel_size=3))
    mels = torch.randn(200, 80), torch.randn(150, 80)
    settings = TrainingConfig(1, 1, activation_checkpointing=checkpointing)
    codes = BestRqConfig(codebook_size=64, num_codebooks=2, mask_probability=0.1)
    ways = [
        (SpeechPretraining(encoder, codes), BestRqObjective(codes), [Utterance(mel, n) for n, mel in enumerate(mels)]),
        (CharacterCtcModel(encoder), CharacterCtcObjective(), [TranscribedUtterance(mel, [1, 2, 3]) for mel in mels]),
    ]
    for model, objective, samples in ways:
        batch = objective.collate(samples)
        with activation_checkpointing(model, CHECKPOINTED_MODULES, settings):
            training = counted(lambda m=model, o=objective, b=batch: o.loss(m, b).backward())
        mel_frames, masked = batch.lengths.tolist(), objective.count(batch) // codes.num_codebooks
        sizes = (mel_frames, masked) if isinstance(objective, BestRqObjective) else (mel_frames,)
        expected = objective.step_flops(encoder.config, *sizes, activation_checkpointing=checkpointing).total
        assert expected == pytest.approx(training, rel=0.02)
        if not checkpointing:
            assert objective.batch_flops(batch, encoder.config) == expected
