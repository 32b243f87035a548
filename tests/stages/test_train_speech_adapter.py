"""The speech stage: tones are learnt as words, nothing but ears changes, and a run goes on with other settings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mm
from data_prep.sources.recordings import transcription_record
from mm.batch import IGNORED
from mm.encoder_folders import load_speech_encoder, load_vision_encoder, save_speech_encoder
from mm.evaluation.evaluate import evaluate
from mm.language_model import LanguageModelConfig
from mm.run_files import hash_weights, read_description
from mm.run_folder import save
from mm.training.config import TrainingConfig
from mm.training.distillation import with_twin
from mm.training.objectives import next_token_loss
from mm.training.speech import SpeechObjective, ctc_loss
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.adapter import num_tokens
from speech.augmentation import SpecAugmentConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.features import FeatureStatistics
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from stages.train_speech_adapter import TrainSpeechAdapter, main, prepared

ENCODER = {"num_layers": 1, "width": 32, "ffn_width": 48, "num_heads": 2}
ADAPTER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
READER = {**ADAPTER, "ctc_readout": True}
WORDS = {"yes": 440, "no": 1500}  # Hz
RATES = {"speech_*": 3e-3, "*": None}
TWO_STEPS = {"steps": 2, "batch_size": 4, "learning_rates": RATES, "workers": 0}


def words_of(number: int) -> str:
    """One or two words."""
    return " ".join(list(WORDS)[number >> bit & 1] for bit in range(1 + number // 4 % 2))


def tones(number: int, split: str) -> Record:
    """One or two tones of 0.3 s, each of which stands for a word, with some noise around them."""
    rng = np.random.default_rng(number)
    said = words_of(number).split()
    time = np.arange(4800) / 16_000
    sound = [np.zeros(400), *(np.sin(2 * np.pi * WORDS[word] * time + rng.random()) for word in said)]
    samples = 8000 * np.concatenate(sound) + rng.normal(0, 100, 400 + 4800 * len(said))
    return transcription_record(f"tones/{split}/{number}", split, "en", " ".join(said), samples.astype(np.int16))


def hush(number: int, split: str) -> Record:
    """The noise alone, in which nothing is said."""
    rng = np.random.default_rng(number)
    noise = rng.normal(0, 100, rng.integers(3000, 10_000)).astype(np.int16)
    return transcription_record(f"hush/{split}/{number}", split, "en", "", noise)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings") / "shards"
    records = [*(tones(n, "train") for n in range(64)), *(tones(n, "test") for n in range(100, 116))]
    records += [*(hush(n, "train") for n in range(16)), *(hush(n, "test") for n in range(100, 108))]
    write_shards(records, folder)
    return folder


@pytest.fixture(scope="module")
def repeater(tokenizer, tmp_path_factory) -> Path:
    """A run folder of a tiny language model that repeats the words in text; it has neither eyes nor ears."""
    torch.manual_seed(0)
    shape = LanguageModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        context=160,
        stop_tokens=(tokenizer.eos_token_id,),
    )
    model = mm.MultimodalModel(mm.ModelConfig(shape))
    processor = mm.Processor(tokenizer, model.config)
    samples = []
    for said in dict.fromkeys(words_of(number) for number in range(8)):
        parts = [{"type": "text", "text": "Repeat after me in English:"}, {"type": "text", "text": f" {said}"}]
        samples.append(processor.example([{"role": "user", "content": parts}, {"role": "assistant", "content": said}]))
    batch = mm.collate(samples)
    optimizer = torch.optim.AdamW(model.language_model.parameters(), 3e-3)
    for _ in range(150):
        loss = next_token_loss(model, batch) / (batch.labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    folder = tmp_path_factory.mktemp("repeater")
    save(folder, model, processor, bundle=True)
    return folder


@pytest.fixture
def speech_config(run_folder, recordings, tmp_path):
    """speech_config(name, **changes) -> (file, run folder)."""

    def write(name: str = "speech", **changes):
        values = {
            "output": str(tmp_path / name),
            "start_from": str(run_folder),
            "encoder": ENCODER,
            "adapter": ADAPTER,
            "data": [{"path": str(recordings)}],
            "training": {
                "steps": 60,
                "batch_size": 16,
                "learning_rates": RATES,
                "warmup_steps": 5,
                "weight_decay": 0.0,
                "workers": 0,
                "log_every": 10,
            },
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
        )
        return file, tmp_path / name

    return write


def test_words_are_learnt_by_a_frozen_language_model(speech_config, repeater, recordings):
    validation = {"path": str(recordings), "split": "test"}
    file, folder = speech_config(start_from=str(repeater), validation=validation)
    main(["--config", str(file)])
    assert read_description(folder)["parts"]["language_model"] == read_description(repeater)["parts"]["language_model"]
    model, processor = mm.load(folder)
    spoken = [processor.record_example(tones(number, "train")).speech for number in range(64)]
    statistics = FeatureStatistics()
    for (mel,) in spoken:
        statistics.update(mel)
    torch.testing.assert_close(model.speech_encoder.feature_mean, statistics.mean_std()[0])  # without the silences
    for task in ("transcription", "silence"):
        held_out = ShardSet(recordings).select(split="test", task=task)
        report = evaluate(model, processor, held_out, ["exact_match"], max_new_tokens=8)
        assert report.scores["exact_match"].value >= 0.9, task
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert 0.5 < lines[0]["speech/rms_ratio"] < 2  # after ten steps it is still about 1
    assert lines[-1]["audio_seconds_per_second"] > 0 and lines[-1]["eval/answer_accuracy"] >= 0.9


def test_nothing_but_ears_changes(speech_config, run_folder, language_model_folder, make_sample):
    frozen = hash_weights(language_model_folder)
    file, folder = speech_config(training=TWO_STEPS)
    main(["--config", str(file)])
    assert hash_weights(language_model_folder) == frozen
    before, after = mm.load(run_folder)[0], mm.load(folder)[0]
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(state.pop(name), tensor), name
    assert {name.partition(".")[0] for name in state} == {"speech_encoder", "speech_adapter"}
    torch.manual_seed(0)
    fresh = SpeechEncoder(SpeechEncoderConfig(**ENCODER))
    assert not torch.equal(after.speech_encoder.input_proj.weight, fresh.input_proj.weight)
    rows = [make_sample("..i..", 1), make_sample(".....", 2)]
    with torch.inference_mode():
        assert torch.equal(after(mm.collate(rows)), before(mm.collate(rows)))


def test_a_model_that_only_hears_learns_by_alignment_and_goes_on_with_the_language_model(
    speech_config, recordings, language_model_folder
):
    """CTC alone never runs the language model, and its run trains on with the model's own loss."""
    alone = {
        "ctc_weight": 1.0,
        "next_token_weight": 0.0,
        "training": {**TWO_STEPS, "steps": 40, "batch_size": 16},
        "adapter": READER,
    }
    alone["training"] |= {"log_every": 10}
    file, first = speech_config("alone", start_from=None, language_model=str(language_model_folder), **alone)
    main(["--config", str(file)])
    lines = [json.loads(line) for line in (first / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    model, processor = mm.load(first)
    assert model.vision_encoder is None
    samples = [processor.record_example(record(n, "test")) for record in (hush, tones) for n in range(100, 108)]
    objective = SpeechObjective(1.0, 0.0)
    with torch.no_grad():
        batch = mm.collate(samples)
        assert objective.loss(model, batch) / objective.count(batch) < 0.3
        batch.speech = batch.speech[::-1]  # silence for words and words for silence
        assert objective.loss(model, batch) / objective.count(batch) > 2
    heard = processor.record_example(tones(107, "test")).speech
    assert model.encode_audio(heard).square().mean() > 0
    on = {"start_from": str(first), "encoder": None, "adapter": {}, "ctc_weight": 0.1, "training": TWO_STEPS}
    file, second = speech_config("second", **on)
    main(["--config", str(file)])
    other, _ = mm.load(second)
    assert other.config.speech_adapter.ctc_readout
    assert torch.equal(other.speech_encoder.feature_mean, model.speech_encoder.feature_mean)
    assert not torch.equal(other.speech_adapter.boundaries, model.speech_adapter.boundaries)


def test_what_is_heard_stands_among_blanks(repeater):
    """Rows that are the embeddings of the answer's tokens, and of the blank between them, cost next to nothing."""
    model, _ = mm.load(repeater)
    blank = model.config.audio_token_id
    first, second = 70, 80
    answer = [first, second, *model.config.language_model.stop_tokens]
    batch = mm.collate([mm.Sample([5, *answer], [IGNORED, *answer], speech=[torch.zeros(40, 80)])])

    def cost(*heard: int) -> float:
        assert len(heard) == num_tokens(40)
        return float(ctc_loss(model, batch, model.embed(torch.tensor([heard]))[0]))

    with torch.no_grad():
        right = cost(blank, first, first, blank, second)
        assert right < 0.01
        assert cost(blank, second, blank, blank, first) > 10
        assert cost(*[blank] * 5) > 10
        near = model.embed(torch.tensor([blank, first, blank, second, second]))
        near = near + 0.5 * near.std() * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
        exact = float(ctc_loss(model, batch, near))
        with torch.autocast("cpu", torch.bfloat16):
            assert float(ctc_loss(model, batch, near)) == pytest.approx(exact, rel=1e-5)


def test_hearing_is_held_against_reading(speech_config, repeater, recordings):
    """The model that reads the words is the teacher; where nothing is said, or nobody knows what, there is none."""
    file, folder = speech_config(start_from=str(repeater), next_token_weight=0.0, distillation_weight=1.0)
    main(["--config", str(file)])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    model, processor = mm.load(folder)
    record = tones(107, "test")
    prompt, said = record.json["messages"]
    asked = [prompt["content"][0], {"type": "text", "text": said["content"][0]["text"]}]
    read = processor.example([{"role": "user", "content": asked}, said])
    (twin,) = [with_twin(record, processor).twin]
    assert twin == read and not read.speech
    unknown = Record(record.id, {**record.json, "task": "dialogue"}, record.media)
    assert with_twin(unknown, processor).twin is None and with_twin(hush(1, "test"), processor).twin is None
    known = Record(record.id, {**unknown.json, "said": said["content"][0]["text"]}, record.media)
    assert with_twin(known, processor).twin == read

    def answers(sample: mm.Sample) -> torch.Tensor:
        logits = model(mm.collate([sample]))[0, :-1]
        return logits[torch.tensor(sample.labels[1:]) != -100].log_softmax(-1)

    with torch.no_grad():
        hearing, reading = answers(processor.record_example(record)), answers(read)
        expected = (reading.exp() * (reading - hearing)).sum()
        rows = [with_twin(one, processor) for one in (hush(1, "test"), record, unknown)]
        objective = SpeechObjective(0.0, 0.0, 2.0)
        loss = objective.loss(model, objective.collate(rows))
    assert 0 < expected < 0.5
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(speech_config, monkeypatch):
    training = {**TWO_STEPS, "steps": 4, "save_every": 2}
    file, whole = speech_config("whole", training=training, ctc_weight=0.5, adapter=READER)
    main(["--config", str(file)])
    file, halves = speech_config("halves", training=training, ctc_weight=0.5, adapter=READER)
    loss, calls = SpeechObjective.loss, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(SpeechObjective, "loss", interrupted)
        main(["--config", str(file)])
    with pytest.raises(ValueError, match="has not finished"):
        mm.load(halves)
    main(["--config", str(file)])
    state = mm.load(whole)[0].state_dict()
    for name, tensor in mm.load(halves)[0].state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_stripes_follow_from_record_and_epoch(speech_config, recordings):
    file, folder = speech_config(spec_augment={"max_mels": 20}, training=TWO_STEPS)
    main(["--config", str(file)])
    processor = mm.load(folder)[1]
    record = ShardSet(recordings)[5]
    plain = processor.record_example(record)
    config = TrainSpeechAdapter("", [], TrainingConfig(1, 1), spec_augment=SpecAugmentConfig(max_mels=20))
    first, again, later = (prepared(record, epoch, processor, config) for epoch in (0, 0, 1))
    assert first.tokens == plain.tokens and first.labels == plain.labels
    assert torch.equal(first.speech[0], again.speech[0])
    assert not torch.equal(first.speech[0], later.speech[0]) and not torch.equal(first.speech[0], plain.speech[0])


def test_an_encoder_of_its_own_folder_is_taken_as_it_is(speech_config, tmp_path):
    torch.manual_seed(3)
    encoder = SpeechEncoder(SpeechEncoderConfig(**ENCODER))
    encoder.set_feature_statistics(torch.full((80,), -3.0), torch.full((80,), 2.5))
    save_speech_encoder(tmp_path / "encoder", encoder)
    assert torch.equal(load_speech_encoder(tmp_path / "encoder").input_proj.weight, encoder.input_proj.weight)
    only_adapter = {**TWO_STEPS, "learning_rates": {"speech_adapter.*": 1e-3, "*": None}}
    file, folder = speech_config(encoder=None, speech_encoder=str(tmp_path / "encoder"), training=only_adapter)
    main(["--config", str(file)])
    model, _ = mm.load(folder)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.speech_encoder.state_dict()[name], tensor), name
    assert torch.equal(load_speech_encoder(folder).feature_std, encoder.feature_std)  # a run's own, too
    with pytest.raises(ValueError, match="holds no image encoder"):
        load_vision_encoder(tmp_path / "encoder")


def test_noise_and_warps_are_not_for_whispers_features(speech_config, tmp_path, capsys):
    encoder = WhisperEncoder(WhisperEncoderConfig(num_layers=1, width=16, ffn_width=32, num_heads=2, max_seconds=2.0))
    save_speech_encoder(tmp_path / "whisper", encoder)
    shared = {"encoder": None, "speech_encoder": str(tmp_path / "whisper"), "training": TWO_STEPS}
    file, _ = speech_config("noisy", **shared, spec_augment={"max_noise": 3.0})
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert "max_warp, max_gain and max_noise are for a conformer's features" in capsys.readouterr().err
    file, folder = speech_config("striped", **shared, spec_augment={"max_mels": 20})
    main(["--config", str(file)])
    assert (folder / "config.yaml").exists()


def test_what_hears_without_a_readout_is_not_aligned_any_more(speech_config, capsys):
    file, first = speech_config("first", training=TWO_STEPS)
    main(["--config", str(file)])
    file, _ = speech_config("on", start_from=str(first), encoder=None, adapter={}, ctc_weight=0.5)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert f"needs an adapter with a readout, and {first} has one without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {**TWO_STEPS, "learning_rates": {"*": 1e-3}}}, "keeps the language model as it is"),
        (
            {"training": {**TWO_STEPS, "learning_rates": {"speech_*": 1e-3, "image_adapter.*": 1e-3, "*": None}}},
            r"trains speech_\* alone",
        ),
        ({"encoder": None}, "one of the two"),
        ({"speech_encoder": "somewhere"}, "one of the two"),
        ({"start_from": None}, "name start_from"),
        ({"ctc_weight": -1.0}, "ctc_weight is -1"),
        ({"ctc_weight": 0.5}, "a readout and CTC that aligns it, or neither"),
        ({"adapter": READER}, "a readout and CTC that aligns it, or neither"),
        ({"next_token_weight": 0.0}, "are all 0"),
        ({"encoder": None, "speech_encoder": "nowhere.pt"}, "nowhere.pt: no such file"),
    ],
)
def test_wrong_settings_are_named(speech_config, capsys, changes, message):
    file, folder = speech_config("wrong", **changes)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()


def test_data_without_sound_gives_a_new_conformer_no_statistics(speech_config, squares, capsys):
    file, _ = speech_config(data=[{"path": str(squares)}])
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert "no sound in any of" in capsys.readouterr().err
