"""BEST-RQ as a stage: codes behind masks are guessed better than by chance, and masks change from epoch to epoch."""

import json
import re

import numpy as np
import pytest
import torch
import yaml

from data_prep.recordings import transcription_record
from mm.speech_encoders import load_speech_encoder
from mm.training.data import RecordDataset, Source, step_loader
from mm.training.speech import BestRqObjective, SpeechPretraining, Utterance
from shards.writer import write_shards
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from stages.pretrain_speech_encoder import main, utterance_of

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


@pytest.fixture
def config(recordings, tmp_path):
    def write(**changes):
        values = {
            "output": str(tmp_path / "encoder"),
            "data": [{"path": str(recordings)}],
            "encoder": ENCODER,
            "best_rq": BEST_RQ,
            "training": {"steps": 60, "batch_size": 8, "rates": {"*": 5e-3}, "log_every": 10, "workers": 0},
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
        dataset = RecordDataset([Source(str(recordings))], prepare, by_epoch=True)
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

    def padding_share(bucket_steps: int) -> float:
        dataset = RecordDataset([Source(str(tmp_path / "set"))], lambda record: record)
        loader = step_loader(dataset, list, 4, seed=0, bucket_steps=bucket_steps)
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
    more = objective.collate([*samples, objective.idle(module)])
    assert objective.count(more) == objective.count(batch)
    assert torch.allclose(objective.loss(module, more), loss, rtol=1e-4)


def test_collapsed_codes_are_warned_of(capsys):
    objective = BestRqObjective(BestRqConfig(codebook_size=256, num_codebooks=2))
    objective.statistics.update(torch.zeros(5000, 2, dtype=torch.long))
    assert objective.observe(None)["codes/coverage"] == 1 / 256
    assert "codes have collapsed" in capsys.readouterr().err
    assert objective.observe(None)["codes/coverage"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
