"""BEST-RQ as a stage: codes behind masks are guessed better than by chance, and masks change from epoch to epoch."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml

from data_prep.sources.recordings import transcription_record
from mm.speech_encoders import load_speech_encoder
from mm.training.data import DataSource, RecordDataset, step_loader
from mm.training.speech_pretraining import (
    BestRqObjective,
    SpeechPretraining,
    SpellingEncoder,
    SpellingObjective,
    Transcribed,
    Utterance,
    alphabet,
    heard_letters,
    spelling,
)
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.augmentation import SpecAugmentConfig
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from stages.pretrain_speech_encoder import main, prepared, transcribed_of, utterance_of

ENCODER = {"num_layers": 1, "width": 32, "ffn_width": 48, "num_heads": 2}
BEST_RQ = {"mask_span": 8, "mask_probability": 0.08, "code_dim": 8, "codebook_size": 32, "num_codebooks": 2}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Tones that rise or fall, on noise: what is masked follows from what is not."""
    records = []
    for number in range(24):
        rng = np.random.default_rng(number)
        time = np.arange(9600 + 400 * number) / 16_000
        pitch = np.linspace(300, 3000, len(time))[:: 1 if number % 2 else -1]
        samples = 8000 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + rng.normal(0, 50, len(time))
        records.append(transcription_record(f"tone/{number}", "train", "en", "tone", samples.astype(np.int16)))
    folder = tmp_path_factory.mktemp("sounds") / "shards"
    write_shards(records, folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Each letter a pitch: what is said can be read off the features."""
    records = []
    for number in range(32):
        rng = np.random.default_rng(number)
        word = "".join(rng.permutation(list("abcd"))[:3])
        pitches = np.repeat([{"a": 400, "b": 900, "c": 1800, "d": 3200}[letter] for letter in word], 4000)
        samples = 8000 * np.sin(2 * np.pi * np.cumsum(pitches) / 16_000) + rng.normal(0, 50, len(pitches))
        records.append(transcription_record(f"word/{number}", "train", "en", word, samples.astype(np.int16)))
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


def test_codes_are_guessed_and_the_encoder_is_kept(config):
    file, folder = config()
    main(["--config", str(file)])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    by_frequency = np.log(lines[-1]["codes/perplexity"])  # at most what is lost without a look at what is not masked
    assert lines[-1]["loss"] < by_frequency - 0.3 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["codes/guessed"] > 5 / 32
    assert 0.3 < lines[-1]["masked_share"] < 0.6
    assert lines[-1]["codes/coverage"] > 0.3 and 1 < lines[-1]["codes/perplexity"] <= 32
    assert lines[-1]["audio_seconds_per_second"] > 0
    encoder = load_speech_encoder(folder)
    assert encoder.config == SpeechEncoderConfig(**ENCODER)
    assert encoder.feature_std.max() < 10 and encoder.feature_mean.abs().max() > 1


def test_masks_and_crops_are_drawn_anew_in_each_epoch_and_alike_on_a_second_run(recordings):
    encoder = SpeechEncoderConfig(**ENCODER, max_seconds=0.4)

    def prepare(record, epoch):
        return utterance_of(record, epoch, encoder, seed=0)

    def epochs(consumed):
        dataset = RecordDataset([DataSource(str(recordings))], prepare, by_epoch=True)
        loader = step_loader(dataset, list, 24, seed=0, consumed=consumed)
        return [sorted(step, key=lambda one: one.seed) for step, _ in zip(loader, range(2), strict=False)]

    first, second = epochs(0)
    assert all(len(one.mel) == 40 for one in first)
    assert len({one.seed for one in first + second}) == 48
    again = epochs(24)[0]
    for one, same in zip(second, again, strict=True):
        assert one.seed == same.seed and torch.equal(one.mel, same.mel)


def test_steps_of_equal_length_hold_less_padding(tmp_path):
    """Utterances of two lengths: drawn as they come, a step holds both."""
    objective = BestRqObjective(BestRqConfig(**BEST_RQ))

    def padding_share(length_bucket_steps: int) -> float:
        dataset = RecordDataset([DataSource(str(tmp_path / "set"))], lambda record: record)
        loader = step_loader(dataset, list, 4, seed=0, length_bucket_steps=length_bucket_steps)
        for step, _ in zip(loader, range(10), strict=False):
            objective.padding.update([round(100 * record.json["duration"]) for record in step])
        return objective.padding.take()["padding_share"]

    sounds = [np.zeros(1600 * (1 + 4 * (number % 2)), np.int16) for number in range(40)]
    records = [transcription_record(f"sound {n}", "train", "en", "a", sound) for n, sound in enumerate(sounds)]
    write_shards(records, tmp_path / "set")
    assert padding_share(10) < 0.05 and padding_share(1) > 0.25


def test_the_loss_is_over_what_is_masked_and_an_idle_sample_teaches_nothing():
    torch.manual_seed(0)
    module = SpeechPretraining(SpeechEncoder(SpeechEncoderConfig(**ENCODER)), BestRqConfig(**BEST_RQ))
    objective = BestRqObjective(BestRqConfig(**BEST_RQ))
    samples = [Utterance(torch.randn(length, 80), seed) for length, seed in ((61, 1), (90, 2))]
    batch = objective.collate(samples)
    loss = objective.loss(module, batch)
    targets = objective.statistics.counts[0].sum() * 2
    assert objective.count(batch) == int(targets) > 0
    more = objective.collate([*samples, objective.dummy_sample(module)])
    assert objective.count(more) == objective.count(batch)
    assert torch.allclose(objective.loss(module, more), loss, rtol=1e-4)


def test_collapsed_codes_are_warned_of(capsys):
    objective = BestRqObjective(BestRqConfig(codebook_size=256, num_codebooks=2))
    objective.statistics.update(torch.zeros(5000, 2, dtype=torch.long))
    assert objective.observe(None)["codes/coverage"] == 1 / 256
    assert "codes have collapsed" in capsys.readouterr().err
    assert objective.observe(None)["codes/coverage"] == 0


def test_letters_are_learnt_from_transcripts_and_a_run_starts_from_another(config, spoken):
    training = {"steps": 80, "batch_size": 8, "learning_rates": {"*": 5e-3}, "log_every": 20, "workers": 0}
    file, folder = config(data=[{"path": str(spoken)}], transcripts=True, best_rq={}, training=training)
    main(["--config", str(file)])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert lines[-1]["letter_error_rate"] < 0.1 < lines[0]["letter_error_rate"]
    assert not any("letters" in name for name in load_speech_encoder(folder).state_dict())  # the layer is not kept
    begun = folder.with_name("begun")
    main([*("--config", str(file), "--encoder", "null", "--start_from", str(folder), "--output", str(begun)),
          *("--training.steps", "1", "--training.learning_rates", '{"*": 0.0}')])  # fmt: skip
    earlier, later = (load_speech_encoder(run).state_dict() for run in (folder, begun))
    assert all(torch.equal(later[name], value) for name, value in earlier.items())


def test_what_is_spelt_is_changed_by_record_and_visit(spoken):
    augment = SpecAugmentConfig(max_warp=0.1, max_noise=8.0)
    record, encoder = ShardSet(spoken)[0], SpeechEncoderConfig(**ENCODER)
    other = Record("another", {**record.json, "id": "another"}, record.media)
    plain = transcribed_of(record, encoder)
    first, again, later = (prepared(record, visit, encoder, augment, seed=0) for visit in (0, 0, 1))
    assert first.letters == later.letters == plain.letters and first.mel.shape == plain.mel.shape
    assert torch.equal(first.mel, again.mel) and not torch.equal(first.mel, later.mel)
    assert not torch.equal(first.mel, prepared(other, 0, encoder, augment, seed=0).mel)
    assert torch.equal(prepared(record, 1, encoder, None, seed=0).mel, plain.mel)


def test_a_stage_hears_changed_sounds_and_takes_its_statistics_of_plain_ones(config, spoken):
    training = {"steps": 2, "batch_size": 4, "learning_rates": {"*": 1e-3}, "log_every": 1, "workers": 0}
    losses, deviations = [], []
    for augment in (None, {"max_gain": 3.0, "max_noise": 12.0}):
        file, folder = config(
            data=[{"path": str(spoken)}], transcripts=True, best_rq={}, training=training, spec_augment=augment
        )
        main(["--config", str(file), "--output", f"{folder}-{bool(augment)}"])
        run = folder.with_name(f"{folder.name}-{bool(augment)}")
        losses.append(json.loads((run / "metrics.jsonl").open().readline())["loss"])
        deviations.append(load_speech_encoder(run).feature_std)
    assert losses[0] != losses[1] and torch.equal(*deviations)


def test_a_record_that_comes_several_times_in_an_epoch_comes_otherwise_each_time(spoken):
    augment, encoder = SpecAugmentConfig(max_warp=0.1), SpeechEncoderConfig(**ENCODER)

    def prepare(record, visit):
        return record.id, visit, prepared(record, visit, encoder, augment, seed=0).mel

    dataset = RecordDataset([DataSource(str(spoken), repeat=2.5), DataSource(str(spoken))], prepare, by_epoch=True)
    size, number = len(dataset), len(ShardSet(spoken).select(split="train"))
    places = [0, number, 2 * number]
    came = [dataset[epoch * size + place] for epoch in (0, 1) for place in places]
    assert {one[0] for one in came} == {came[0][0]} and [one[1] for one in came] == [0, 1, 2, 3, 4, 5]
    assert all(not torch.equal(one[2], other[2]) for one, other in combinations(came, 2))
    assert [dataset[epoch * size + 3 * number][1] for epoch in (0, 1)] == [
        0,
        1,
    ]  # of the second source, which repeats none


def test_the_loss_over_letters_is_the_sum_of_each_utterance_alone():
    torch.manual_seed(0)
    module, objective = SpellingEncoder(SpeechEncoder(SpeechEncoderConfig(**ENCODER))), SpellingObjective()
    samples = [Transcribed(torch.randn(length, 80), spelling(text)) for length, text in ((61, "ab"), (140, "Cab, 'd'"))]
    alone = [objective.collate([sample]) for sample in samples]
    both = objective.collate([*samples, objective.dummy_sample(module)])
    assert objective.count(both) == sum(map(objective.count, alone)) == 2 + 5
    torch.testing.assert_close(objective.loss(module, both), sum(objective.loss(module, one) for one in alone))


def test_what_is_said_is_spelt_in_small_letters_without_punctuation():
    def spelt(text: str) -> str:
        letters = {number: letter for letter, number in alphabet().items()}
        return "".join(letters[number] for number in spelling(text))

    assert spelt("  Don’t  press “#1” -- 'naïve' ÉTÉ! ") == "don't press 1 naïve été"
    assert spelt("Звёзды, Straße Ωμέγα") == "звёзды strasse ωμέγα"
    assert spelt("...") == "" and spelt("İstanbul tiếng Việt") == "istanbul tiếng việt"
    with pytest.raises(ValueError, match="letters other than Latin, Greek and Cyrillic: 日本"):
        spelling("日本")


def test_the_likeliest_path_leaves_out_blanks_and_repeats():
    path = torch.tensor([0, 3, 3, 0, 3, 5, 5, 0])
    assert heard_letters(path) == [3, 3, 5]


def test_what_is_said_is_spelt_and_not_what_is_answered(spoken):
    record = ShardSet(spoken)[0]
    encoder = SpeechEncoderConfig(**ENCODER)
    letters = transcribed_of(record, encoder).letters
    answered = Record(record.id, {**record.json, "task": "dialogue"}, record.media)
    with pytest.raises(ValueError, match="does not tell what is said"):
        transcribed_of(answered, encoder)
    answered.json["said"] = "dcba"
    assert transcribed_of(answered, encoder).letters == spelling("dcba") != letters


def test_the_error_rate_is_of_all_that_was_said_since_the_last_report():
    torch.manual_seed(0)
    module, objective = SpellingEncoder(SpeechEncoder(SpeechEncoderConfig(**ENCODER))), SpellingObjective()
    samples = [Transcribed(torch.randn(80, 80), spelling("ab")), objective.dummy_sample(module)]
    for sample in samples:  # the second, a rank's without work, counts for nothing
        objective.loss(module, objective.collate([sample]))
    rate = objective.observe(module)["letter_error_rate"]
    objective.loss(module, objective.collate(samples))
    assert rate == objective.observe(module)["letter_error_rate"] > 0
    assert objective.observe(module)["letter_error_rate"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "runs/ears"}, "one of the two"),
        ({"encoder": None}, "one of the two"),
        ({"encoder": None, "start_from": "nowhere"}, "nowhere"),
        ({"transcripts": True}, "leave one of them out"),
        ({"spec_augment": {}}, "spec_augment is for transcripts: true"),
        (
            {"transcripts": True, "best_rq": {}, "encoder": {**ENCODER, "max_seconds": 0.1}},
            "more than the encoder's 0.1 s",
        ),
        ({"encoder": {**ENCODER, "width": 33}}, "width 33"),
        ({"statistics_samples": 0}, "0 samples"),
        ({"data": [{"path": "nowhere"}]}, "nowhere"),
    ],
)
def test_wrong_settings_are_named(config, capsys, changes, message):
    file, folder = config(**changes)
    with pytest.raises(SystemExit, match="1"):
        main(["--config", str(file)])
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "config.yaml").exists()
