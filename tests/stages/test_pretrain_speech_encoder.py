"""The stage that trains a speech encoder by itself, with BEST-RQ and with CTC over characters."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml

from data_prep.sources.recordings import transcription_record
from foundation.errors import UserError
from mm.encoder_folders import load_speech_encoder
from mm.training.character_ctc import encode_characters
from mm.training.data import DataSource, RecordDataset, step_loader
from mm.training.speech import PaddingMeter
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.augmentation import SpecAugmentConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from stages.pretrain_speech_encoder import augmented_utterance, main, masked_utterance, transcribed_utterance

ENCODER = {"num_layers": 1, "width": 32, "ffn_width": 48, "num_heads": 2}
BEST_RQ = {"mask_span": 8, "mask_probability": 0.08, "code_dim": 8, "codebook_size": 32, "num_codebooks": 2}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Rising and falling tones on noise: the masked frames follow from the others."""
    records = []
    for index in range(24):
        rng = np.random.default_rng(index)
        time = np.arange(9600 + 400 * index) / 16_000
        pitch = np.linspace(300, 3000, len(time))[:: 1 if index % 2 else -1]
        samples = 8000 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + rng.normal(0, 50, len(time))
        records.append(transcription_record(f"tone/{index}", "train", "en", "tone", samples.astype(np.int16)))
    folder = tmp_path_factory.mktemp("sounds") / "shards"
    write_shards(records, folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Words in which each letter is a pitch."""
    records = []
    for index in range(32):
        rng = np.random.default_rng(index)
        word = "".join(rng.permutation(list("abcd"))[:3])
        pitches = np.repeat([{"a": 400, "b": 900, "c": 1800, "d": 3200}[letter] for letter in word], 4000)
        samples = 8000 * np.sin(2 * np.pi * np.cumsum(pitches) / 16_000) + rng.normal(0, 50, len(pitches))
        records.append(transcription_record(f"word/{index}", "train", "en", word, samples.astype(np.int16)))
    folder = tmp_path_factory.mktemp("spoken") / "shards"
    write_shards(records, folder)
    return folder


@pytest.fixture
def config(recordings, tmp_path):
    def write(**changes):
        values = {
            "output": str(tmp_path / "encoder"),
            "data": [{"path": str(recordings)}],
            "encoder": ENCODER,
            "best_rq": BEST_RQ,
            "training": {"steps": 60, "batch_size": 8, "learning_rates": {"*": 5e-3}, "log_every": 10, "workers": 0},
            **changes,
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file, tmp_path / "encoder"

    return write


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_masked_codes_are_predicted_better_than_by_their_frequencies(config):
    file, folder = config()
    main(["--config", str(file)])
    first, *_, last = read_metrics(folder)
    loss_by_frequencies = np.log(last["code_perplexity"])  # of a model that ignores what is not masked
    assert last["loss"] < loss_by_frequencies - 0.3 and last["loss"] < first["loss"]
    assert last["code_accuracy"] > 5 / 32
    assert 0.3 < last["masked_share"] < 0.6
    assert last["code_coverage"] > 0.3 and 1 < last["code_perplexity"] <= 32
    assert last["audio_seconds_per_second"] > 0


def test_the_encoder_is_kept_with_its_feature_statistics(config):
    file, folder = config()
    main(["--config", str(file), "--training.steps", "1"])
    encoder = load_speech_encoder(folder)
    assert encoder.config == SpeechEncoderConfig(**ENCODER)
    assert encoder.feature_std.max() < 10 and encoder.feature_mean.abs().max() > 1


def test_masks_and_crops_are_drawn_anew_in_each_epoch_and_repeat_on_a_second_run(recordings):
    encoder = SpeechEncoderConfig(**ENCODER, max_seconds=0.4)

    def prepare(record, epoch):
        return masked_utterance(record, epoch, encoder, seed=0)

    def epochs(consumed):
        dataset = RecordDataset([DataSource(str(recordings))], prepare, by_epoch=True)
        loader = step_loader(dataset, list, 24, seed=0, consumed=consumed)
        return [sorted(step, key=lambda sample: sample.seed) for step, _ in zip(loader, range(2), strict=False)]

    first, second = epochs(0)
    assert all(len(sample.mel) == 40 for sample in first)
    assert len({sample.seed for sample in first + second}) == 48
    resumed = epochs(24)[0]
    for sample, same in zip(second, resumed, strict=True):
        assert sample.seed == same.seed and torch.equal(sample.mel, same.mel)


def test_length_buckets_reduce_padding(tmp_path):
    """Of utterances of two lengths a step without buckets holds both."""

    def padding_share(length_bucket_steps: int) -> float:
        dataset = RecordDataset([DataSource(str(tmp_path / "set"))], lambda record: record)
        loader = step_loader(dataset, list, 4, seed=0, length_bucket_steps=length_bucket_steps)
        padding = PaddingMeter()
        for step, _ in zip(loader, range(10), strict=False):
            padding.update([round(100 * record.json["duration"]) for record in step])
        return padding.pop()["padding_share"]

    sounds = [np.zeros(1600 * (1 + 4 * (index % 2)), np.int16) for index in range(40)]
    records = [transcription_record(f"sound {index}", "train", "en", "a", sound) for index, sound in enumerate(sounds)]
    write_shards(records, tmp_path / "set")
    assert padding_share(10) < 0.05 and padding_share(1) > 0.25


def test_characters_are_learnt_from_transcripts_and_their_layer_is_not_kept(config, spoken):
    training = {"steps": 120, "batch_size": 8, "learning_rates": {"*": 5e-3}, "log_every": 20, "workers": 0}
    file, folder = config(data=[{"path": str(spoken)}], character_ctc=True, best_rq={}, training=training)
    main(["--config", str(file)])
    first, *_, last = read_metrics(folder)
    assert last["character_error_rate"] < 0.1 < first["character_error_rate"]
    assert (
        load_speech_encoder(folder).state_dict().keys()
        == SpeechEncoder(SpeechEncoderConfig(**ENCODER)).state_dict().keys()
    )


def test_a_run_starts_from_the_encoder_of_an_earlier_run(config, tmp_path):
    file, folder = config(training={"steps": 1, "batch_size": 8, "learning_rates": {"*": 5e-3}, "workers": 0})
    main(["--config", str(file)])
    second = tmp_path / "second"
    main([*("--config", str(file), "--encoder", "null", "--start_from", str(folder), "--output", str(second)),
          *("--training.learning_rates", '{"*": 0.0}')])  # fmt: skip
    earlier, later = (load_speech_encoder(run).state_dict() for run in (folder, second))
    assert all(torch.equal(later[name], value) for name, value in earlier.items())


def test_augmentation_is_a_function_of_record_and_visit(spoken):
    augment = SpecAugmentConfig(max_warp=0.1, max_noise=8.0)
    record, encoder = ShardSet(spoken)[0], SpeechEncoderConfig(**ENCODER)
    other = Record("another", {**record.json, "id": "another"}, record.media)
    plain = transcribed_utterance(record, encoder)
    first, again, later = (augmented_utterance(record, visit, encoder, augment, seed=0) for visit in (0, 0, 1))
    assert first.characters == later.characters == plain.characters and first.mel.shape == plain.mel.shape
    assert torch.equal(first.mel, again.mel) and not torch.equal(first.mel, later.mel)
    assert not torch.equal(first.mel, augmented_utterance(other, 0, encoder, augment, seed=0).mel)
    assert torch.equal(augmented_utterance(record, 1, encoder, None, seed=0).mel, plain.mel)


def test_training_is_augmented_and_feature_statistics_are_not(config, spoken):
    training = {"steps": 2, "batch_size": 4, "learning_rates": {"*": 1e-3}, "log_every": 1, "workers": 0}
    losses, deviations = [], []
    for augment in (None, {"max_gain": 3.0, "max_noise": 12.0}):
        file, folder = config(
            data=[{"path": str(spoken)}], character_ctc=True, best_rq={}, training=training, spec_augment=augment
        )
        run = folder.with_name(f"{folder.name}-{bool(augment)}")
        main(["--config", str(file), "--output", str(run)])
        losses.append(read_metrics(run)[0]["loss"])
        deviations.append(load_speech_encoder(run).feature_std)
    assert losses[0] != losses[1] and torch.equal(*deviations)


def test_a_record_that_repeats_in_an_epoch_is_augmented_differently_each_time(spoken):
    augment, encoder = SpecAugmentConfig(max_warp=0.1), SpeechEncoderConfig(**ENCODER)

    def prepare(record, visit):
        return record.id, visit, augmented_utterance(record, visit, encoder, augment, seed=0).mel

    dataset = RecordDataset([DataSource(str(spoken), repeat=2.5), DataSource(str(spoken))], prepare, by_epoch=True)
    size, num_records = len(dataset), len(ShardSet(spoken).select(split="train"))
    first_record = [0, num_records, 2 * num_records]
    repeated = [dataset[epoch * size + index] for epoch in (0, 1) for index in first_record]
    assert {record for record, _, _ in repeated} == {repeated[0][0]}
    assert [visit for _, visit, _ in repeated] == [0, 1, 2, 3, 4, 5]
    assert all(not torch.equal(mel, other) for (*_, mel), (*_, other) in combinations(repeated, 2))
    not_repeated = [dataset[epoch * size + 3 * num_records] for epoch in (0, 1)]  # the second source's first record
    assert [visit for _, visit, _ in not_repeated] == [0, 1]


def test_targets_are_the_transcript_and_not_the_answer(spoken):
    record = ShardSet(spoken)[0]
    encoder = SpeechEncoderConfig(**ENCODER)
    characters = transcribed_utterance(record, encoder).characters
    dialogue = Record(record.id, {**record.json, "task": "dialogue"}, record.media)
    with pytest.raises(UserError, match="no transcript"):
        transcribed_utterance(dialogue, encoder)
    dialogue.json["said"] = "dcba"
    assert transcribed_utterance(dialogue, encoder).characters == encode_characters("dcba") != characters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "runs/ears"}, "one of the two"),
        ({"encoder": None}, "one of the two"),
        ({"encoder": None, "start_from": "nowhere"}, "nowhere"),
        ({"character_ctc": True}, "leave one of them out"),
        ({"spec_augment": {}}, "spec_augment is for character_ctc: true"),
        (
            {"character_ctc": True, "best_rq": {}, "encoder": {**ENCODER, "max_seconds": 0.1}},
            "more than the encoder's 0.1 s",
        ),
        ({"encoder": {**ENCODER, "width": 33}}, "width 33"),
        ({"statistics_samples": 0}, "0 samples"),
        ({"data": [{"path": "nowhere"}]}, "nowhere"),
    ],
)
def test_wrong_settings_end_with_a_message_that_names_them(config, capsys, changes, message):
    file, folder = config(**changes)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()
