"""The speech stage: it learns tones as words, changes the speech parts alone, and trains on with other settings."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mm
from data_prep.sources.recordings import transcription_record
from mm.encoder_folders import load_speech_encoder, load_vision_encoder, save_speech_encoder
from mm.evaluation.evaluate import evaluate
from mm.language_model import LanguageModelConfig
from mm.run_files import hash_weights, read_description
from mm.run_folder import save
from mm.training.config import TrainingConfig
from mm.training.objectives import next_token_loss
from mm.training.speech import SpeechObjective
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.augmentation import SpecAugmentConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.features import FeatureStatistics
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from stages.train_speech_adapter import TrainSpeechAdapter, main, training_sample

ENCODER = {"num_layers": 1, "width": 32, "ffn_width": 48, "num_heads": 2}
ADAPTER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
READOUT_ADAPTER = {**ADAPTER, "ctc_readout": True}
WORDS = {"yes": 440, "no": 1500}  # Hz
RATES = {"speech_*": 3e-3, "*": None}
TWO_STEPS = {"steps": 2, "batch_size": 4, "learning_rates": RATES, "workers": 0}


def words_of(index: int) -> str:
    """One or two words."""
    return " ".join(list(WORDS)[index >> bit & 1] for bit in range(1 + index // 4 % 2))


def tones(index: int, split: str) -> Record:
    """One or two tones of 0.3 s, each of which stands for a word, with some noise around them."""
    rng = np.random.default_rng(index)
    words = words_of(index).split()
    time = np.arange(4800) / 16_000
    sound = [np.zeros(400), *(np.sin(2 * np.pi * WORDS[word] * time + rng.random()) for word in words)]
    samples = 8000 * np.concatenate(sound) + rng.normal(0, 100, 400 + 4800 * len(words))
    return transcription_record(f"tones/{split}/{index}", split, "en", " ".join(words), samples.astype(np.int16))


def noise(index: int, split: str) -> Record:
    """Noise without speech."""
    rng = np.random.default_rng(index)
    samples = rng.normal(0, 100, rng.integers(3000, 10_000)).astype(np.int16)
    return transcription_record(f"noise/{split}/{index}", split, "en", "", samples)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings") / "shards"
    records = [*(tones(n, "train") for n in range(64)), *(tones(n, "test") for n in range(100, 116))]
    records += [*(noise(n, "train") for n in range(16)), *(noise(n, "test") for n in range(100, 108))]
    write_shards(records, folder)
    return folder


@pytest.fixture(scope="module")
def repeater(tokenizer, tmp_path_factory) -> Path:
    """A run folder of a tiny language model alone, which repeats words that it is given as text."""
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
    for words in dict.fromkeys(words_of(index) for index in range(8)):
        parts = [{"type": "text", "text": "Repeat after me in English:"}, {"type": "text", "text": f" {words}"}]
        samples.append(processor.example([{"role": "user", "content": parts}, {"role": "assistant", "content": words}]))
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


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_a_frozen_language_model_learns_to_transcribe(speech_config, repeater, recordings):
    validation = {"path": str(recordings), "split": "test"}
    file, folder = speech_config(start_from=str(repeater), validation=validation)
    main(["--config", str(file)])
    assert read_description(folder)["parts"]["language_model"] == read_description(repeater)["parts"]["language_model"]
    model, processor = mm.load(folder)
    for task in ("transcription", "silence"):
        held_out = ShardSet(recordings).select(split="test", task=task)
        report = evaluate(model, processor, held_out, ["exact_match"], max_new_tokens=8)
        assert report.scores["exact_match"].value >= 0.9, task
    first, *_, last = read_metrics(folder)
    assert last["loss"] < 0.3 * first["loss"]
    assert 0.5 < first["speech/rms_ratio"] < 2  # it starts at 1, and this is step 10
    assert last["audio_seconds_per_second"] > 0 and last["eval/answer_accuracy"] >= 0.9


def test_feature_statistics_are_those_of_the_recordings_with_speech(speech_config, repeater):
    file, folder = speech_config(start_from=str(repeater), training=TWO_STEPS)
    main(["--config", str(file)])
    model, processor = mm.load(folder)
    statistics = FeatureStatistics()
    for index in range(64):
        (mel,) = processor.record_example(tones(index, "train")).speech
        statistics.update(mel)
    torch.testing.assert_close(model.speech_encoder.feature_mean, statistics.mean_std()[0])


def test_nothing_but_the_speech_parts_changes(speech_config, run_folder, language_model_folder, make_sample):
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


@pytest.fixture
def aligned_run(speech_config, language_model_folder):
    """aligned_run() -> a run folder of a model without images, trained with CTC alone."""

    def train():
        training = {**TWO_STEPS, "steps": 40, "batch_size": 16, "log_every": 10}
        changes = {"start_from": None, "language_model": str(language_model_folder), "adapter": READOUT_ADAPTER}
        file, folder = speech_config("aligned", **changes, ctc_weight=1.0, next_token_weight=0.0, training=training)
        main(["--config", str(file)])
        return folder

    return train


def test_ctc_alone_aligns_a_model_without_images(aligned_run):
    folder = aligned_run()
    first, *_, last = read_metrics(folder)
    assert last["loss"] < 0.3 * first["loss"]
    model, processor = mm.load(folder)
    assert model.vision_encoder is None
    samples = [
        processor.record_example(record(index, "test")) for record in (noise, tones) for index in range(100, 108)
    ]
    objective = SpeechObjective(1.0, 0.0)
    with torch.no_grad():
        batch = mm.collate(samples)
        assert objective.loss(model, batch) / objective.count(batch) < 0.3
        batch.speech = batch.speech[::-1]  # words with noise, and noise with words
        assert objective.loss(model, batch) / objective.count(batch) > 2


def test_an_aligned_run_trains_on_with_the_language_models_loss(aligned_run, speech_config):
    first = aligned_run()
    file, second = speech_config(
        "second", start_from=str(first), encoder=None, adapter={}, ctc_weight=0.1, training=TWO_STEPS
    )
    main(["--config", str(file)])
    before, after = mm.load(first)[0], mm.load(second)[0]
    assert after.config.speech_adapter.ctc_readout
    assert torch.equal(after.speech_encoder.feature_mean, before.speech_encoder.feature_mean)
    assert not torch.equal(after.speech_adapter.boundaries, before.speech_adapter.boundaries)


def test_distillation_trains_towards_the_transcripts_distribution(speech_config, repeater):
    file, folder = speech_config(start_from=str(repeater), next_token_weight=0.0, distillation_weight=1.0)
    main(["--config", str(file)])
    first, *_, last = read_metrics(folder)
    assert last["loss"] < 0.3 * first["loss"]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(speech_config, monkeypatch):
    training = {**TWO_STEPS, "steps": 4, "save_every": 2}
    file, uninterrupted = speech_config("uninterrupted", training=training, ctc_weight=0.5, adapter=READOUT_ADAPTER)
    main(["--config", str(file)])
    file, resumed = speech_config("resumed", training=training, ctc_weight=0.5, adapter=READOUT_ADAPTER)
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
        mm.load(resumed)
    main(["--config", str(file)])
    state = mm.load(uninterrupted)[0].state_dict()
    for name, tensor in mm.load(resumed)[0].state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_augmentation_is_a_function_of_record_and_visit(speech_config, recordings):
    file, folder = speech_config(spec_augment={"max_mels": 20}, training=TWO_STEPS)
    main(["--config", str(file)])
    processor = mm.load(folder)[1]
    record = ShardSet(recordings)[5]
    plain = processor.record_example(record)
    config = TrainSpeechAdapter("", [], TrainingConfig(1, 1), spec_augment=SpecAugmentConfig(max_mels=20))
    first, again, later = (training_sample(record, visit, processor, config) for visit in (0, 0, 1))
    assert first.tokens == plain.tokens and first.labels == plain.labels
    assert torch.equal(first.speech[0], again.speech[0])
    assert not torch.equal(first.speech[0], later.speech[0]) and not torch.equal(first.speech[0], plain.speech[0])


def test_an_encoder_folder_is_used_with_its_feature_statistics(speech_config, tmp_path):
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
    assert torch.equal(load_speech_encoder(folder).feature_std, encoder.feature_std)  # a run is an encoder folder too
    with pytest.raises(ValueError, match="holds no image encoder"):
        load_vision_encoder(tmp_path / "encoder")


def test_whispers_features_take_masks_and_no_noise(speech_config, tmp_path, capsys):
    encoder = WhisperEncoder(WhisperEncoderConfig(num_layers=1, width=16, ffn_width=32, num_heads=2, max_seconds=2.0))
    save_speech_encoder(tmp_path / "whisper", encoder)
    shared = {"encoder": None, "speech_encoder": str(tmp_path / "whisper"), "training": TWO_STEPS}
    file, _ = speech_config("noisy", **shared, spec_augment={"max_noise": 3.0})
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert "max_warp, max_gain and max_noise are for a conformer's features" in capsys.readouterr().err
    file, folder = speech_config("masked", **shared, spec_augment={"max_mels": 20})
    main(["--config", str(file)])
    assert (folder / "config.yaml").exists()


def test_ctc_needs_an_adapter_with_a_readout(speech_config, capsys):
    file, first = speech_config("first", training=TWO_STEPS)
    main(["--config", str(file)])
    file, _ = speech_config("on", start_from=str(first), encoder=None, adapter={}, ctc_weight=0.5)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert f"ctc_weight needs an adapter with a readout, and {first} has one without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {**TWO_STEPS, "learning_rates": {"*": 1e-3}}}, "freezes the language model"),
        (
            {"training": {**TWO_STEPS, "learning_rates": {"speech_*": 1e-3, "image_adapter.*": 1e-3, "*": None}}},
            r"trains speech_\* alone",
        ),
        ({"encoder": None}, "one of the two"),
        ({"speech_encoder": "somewhere"}, "one of the two"),
        ({"start_from": None}, "name start_from"),
        ({"ctc_weight": -1.0}, "ctc_weight is -1"),
        ({"ctc_weight": 0.5}, "a readout and CTC that aligns it, or neither"),
        ({"adapter": READOUT_ADAPTER}, "a readout and CTC that aligns it, or neither"),
        ({"next_token_weight": 0.0}, "are all 0"),
        ({"encoder": None, "speech_encoder": "nowhere.pt"}, "nowhere.pt: no such file"),
    ],
)
def test_wrong_settings_end_with_a_message_that_names_them(speech_config, capsys, changes, message):
    file, folder = speech_config("wrong", **changes)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()


def test_a_new_conformer_needs_data_with_sound(speech_config, squares, capsys):
    file, _ = speech_config(data=[{"path": str(squares)}])
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert "none of the 192 records to train on shows utterances" in capsys.readouterr().err
