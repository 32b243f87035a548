"""Speech in the model: which rows it fills, which it leaves unchanged, and every modality in one batch.

Tolerances as in test_model.py.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import mm
from foundation.errors import UserError
from mm.run_folder import save
from speech.adapter import num_tokens
from tests.media import sound
from video.sampling import Clip

CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def config(everything_config) -> mm.ModelConfig:
    return everything_config


@pytest.fixture(scope="module")
def model(beside_tiny_model, config) -> mm.MultimodalModel:
    return beside_tiny_model(config, seed=2)


@pytest.fixture(scope="module")
def sample(make_sample, config, random_tiles) -> Callable[..., mm.Sample]:
    """sample("..s.iv", mels=(30,), seed=0): `s` is an utterance of so many mel frames, `v` a clip, `i` an image."""

    def make(pattern: str, mels: tuple[int, ...] = (30,), seed: int = 0) -> mm.Sample:
        made = make_sample(pattern, seed)
        generator = torch.Generator().manual_seed(seed)
        made.speech = [
            torch.randn(mels[n % len(mels)], 80, generator=generator) * 3 + 8 for n in range(pattern.count("s"))
        ]
        lengths = iter(made.speech)
        tokens: list[int] = []
        for mark, token in zip(pattern, made.tokens, strict=True):
            if mark == "s":
                embedded = [config.audio_token_id] * num_tokens(len(next(lengths)))
                tokens += [config.speech_start_id, *embedded, config.speech_end_id]
            else:
                tokens.append(config.video_token_id if mark == "v" else token)
        made.tokens = tokens
        times = torch.arange(3, dtype=torch.float64)
        made.videos = [Clip([random_tiles(7 * seed + n) for n in range(3)], times) for _ in range(pattern.count("v"))]
        return made

    return make


def logits(model: mm.MultimodalModel, *samples: mm.Sample) -> torch.Tensor:
    return model(mm.collate(samples))


def test_rows_without_speech_are_unchanged_to_the_bit(model, tiny_model, sample, make_sample):
    rows = [make_sample("..i..", 1), sample("..s..", seed=5), make_sample(".....", 2)]
    padding = [0] * (len(rows[1].tokens) - 5)
    plain = [replace(row, tokens=row.tokens + padding) for row in (rows[0], make_sample(".....", 3), rows[2])]
    with_speech, bare = logits(model, *rows), logits(tiny_model, *plain)
    assert torch.equal(with_speech[[0, 2], :5], bare[[0, 2], :5])


def test_audio_embeddings_stand_between_the_adapters_marks(model, config, sample):
    made = sample(".s.", (30,))
    batch = mm.collate([made])
    x = model.insert_audio_embeddings(model.embed(batch.tokens), batch)[0]
    mel = made.speech[0]
    embedded, counts = model.speech_adapter(*model.speech_encoder(mel[None], torch.tensor([len(mel)])))
    assert counts.tolist() == [4]
    assert torch.equal(x[2:6], embedded[0])
    assert torch.equal(x[[1, 6]], model.speech_adapter.boundaries)
    assert torch.equal(x[[0, 7]], model.embed(batch.tokens)[0, [0, 7]])


def test_speech_beyond_the_encoders_limit_is_encoded_in_pieces(model, config, sample):
    long = sample("s", (200,))
    assert config.speech_encoder.max_mel_frames == 80
    batch = mm.collate([long])
    x = model.insert_audio_embeddings(model.embed(batch.tokens), batch)[0, 1:-1]
    parts = []
    for piece in long.speech[0].split(80):
        one = mm.Sample([config.audio_token_id] * num_tokens(len(piece)), speech=[piece])
        parts.append(model.insert_audio_embeddings(model.embed(mm.collate([one]).tokens), mm.collate([one]))[0])
    assert torch.allclose(x, torch.cat(parts), **CLOSE)


def test_a_batch_gives_each_row_what_it_gets_alone(model, sample, make_sample):
    rows = [
        sample(".s..", (7,)),
        sample("s.s", (90, 31), 1),
        make_sample(".i.", 2),
        sample("i.v.s.", (44,), 3),
        sample(".v.", (), 4),
    ]
    together = logits(model, *rows)
    for index, row in enumerate(rows):
        assert torch.allclose(together[index, : len(row.tokens)], logits(model, row)[0], **CLOSE)


def test_speech_does_not_act_on_earlier_tokens(model, sample):
    first = sample("i..s..", (30,))
    second = replace(first, speech=[first.speech[0] + 2.0])
    a, b = logits(model, first)[0], logits(model, second)[0]
    assert torch.equal(a[:4], b[:4])
    assert ((a - b).abs().amax(-1)[4:] > 1e-4).all()


@pytest.mark.parametrize("ctc_readout", [False, True])
def test_cached_decoding_equals_the_whole_pass(model, sample, ctc_readout, beside_tiny_model, config, decoding_logits):
    """In a batch with a row of two utterances, of which the first is longer than the encoder's limit."""
    rows = [sample("s.v.", (33,)), sample("i.s.s", (100, 8), 1)]
    if ctc_readout:
        adapter = replace(config.speech_adapter, ctc_readout=True)
        reader = beside_tiny_model(replace(config, speech_adapter=adapter), seed=2)
        assert not torch.allclose(logits(model, rows[1]), logits(reader, rows[1]), **CLOSE)
        model = reader
    new = [[5, 9, 11], [7, 8, 20]]
    found = decoding_logits(model, rows, new)
    for count, step in enumerate(found):
        longer = [replace(row, tokens=row.tokens + added[:count]) for row, added in zip(rows, new, strict=True)]
        for row, one in enumerate(longer):
            assert torch.allclose(step[row], logits(model, one)[0, -1], **CLOSE)


def test_a_run_with_every_part_comes_back(model, config, tokenizer, sample, tmp_path):
    processor = mm.Processor(tokenizer, config, max_frames=9, max_frame_tiles=2, video_prompt="And then?")
    save(tmp_path / "run", model, processor, bundle=True)
    loaded, settings = mm.load(tmp_path / "run")
    assert loaded.config == config
    assert (settings.max_frames, settings.max_frame_tiles, settings.video_prompt) == (9, 2, "And then?")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    made = sample("i.v.s", (20,))
    assert torch.allclose(logits(loaded, made), logits(model, made), **CLOSE)  # kernels go by where tensors lie


def test_gradients_reach_encoder_adapter_and_marks(build_model, config, sample):
    with torch.inference_mode(False):
        model = build_model(config).requires_grad_(False)
        model.speech_encoder.requires_grad_(True)
        model.speech_adapter.requires_grad_(True)
        made = sample("s.s", (9, 21))
        logits(model, made).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("speech_"), name
            if parameter.grad is not None:
                assert parameter.grad.abs().max() > 0, name


def test_a_ctc_readout_gives_the_language_model_text(build_model, config, sample):
    """Rows of token embeddings between blanks act like the text itself, with the end mark in the remaining rows."""
    plain = build_model(config)
    reader = build_model(replace(config, speech_adapter=replace(config.speech_adapter, ctc_readout=True)))
    reader.load_state_dict(plain.state_dict())
    made = sample("..s.", (40,))
    transcript, blank, end = [7, 30], config.audio_token_id, config.speech_end_id
    rows = reader.embed(torch.tensor([[blank, transcript[0], transcript[0], blank, transcript[1]]]))[0]
    reader._encode_audio = lambda speech: rows
    found = logits(reader, made)
    start = made.tokens.index(blank)
    text = [*made.tokens[:start], *transcript, end, end, end, *made.tokens[start + 5 :]]
    marks = dict(zip((config.speech_start_id, end), plain.speech_adapter.boundaries, strict=True))
    x = torch.stack([marks.get(token, plain.embed(torch.tensor([[token]]))[0, 0]) for token in text])
    hidden = plain.run_layers(x[None], torch.arange(len(text)), {})
    expected = plain.language_model.lm_head(plain.language_model.model.norm(hidden))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # a mean of eight embeddings, nearly all of one
    assert not torch.allclose(found, logits(plain, made), **CLOSE)


def test_wrong_use_is_named(model, tiny_model, sample, config):
    short = sample("s.", (30,))
    with pytest.raises(ValueError, match=r"row 0 has 3 audio tokens .* and 1 utterances, which take 4"):
        logits(model, replace(short, tokens=short.tokens[:1] + short.tokens[2:]))
    with pytest.raises(ValueError, match=r"row 0 has 4 audio tokens .* and 0 utterances"):
        logits(model, replace(short, speech=[]))
    with pytest.raises(ValueError, match="no speech_encoder"):
        logits(tiny_model, short)
    with pytest.raises(ValueError, match="needs both speech_encoder and speech_adapter"):
        replace(config, speech_adapter=None)


def test_presets_have_the_published_size():
    with torch.device("meta"):
        model = mm.MultimodalModel(mm.preset("8b", speech=True))
    assert sum(p.numel() for p in model.speech_encoder.parameters()) == pytest.approx(1.0e9, rel=0.03)
    assert sum(p.numel() for p in model.speech_adapter.parameters()) == pytest.approx(100e6, rel=0.05)


def test_an_empty_answer_that_no_template_ends_is_refused_by_its_reason(tokenizer, config):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    processor = mm.Processor(tokenizer, config, chat_template=template)
    user = {"role": "user", "content": [{"type": "audio", "audio": sound(0.5)}]}
    with pytest.raises(UserError, match="hold no token to learn"):
        processor.example([user, {"role": "assistant", "content": ""}])
