"""Data without a single picture, clip or sound are refused; one among many is enough."""

import re

import pytest

from mm.modalities import AUDIO, IMAGE, MODALITIES, VIDEO
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.media import check_media, likely_indices
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards

SUFFIXES = {"image": "jpg", "video": "clip.mp4", "audio": "flac"}


def text_record(number: int, **values) -> Record:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    name = f"r{number:03d}"
    return Record(
        name, {"id": name, "split": "train", "task": "chat", "language": "en", "messages": messages, **values}
    )


def media_record(number: int, kind: str, **values) -> Record:
    record = text_record(number, **values)
    record.media[SUFFIXES[kind]] = b"not read by the check"
    part = {"type": kind, kind: SUFFIXES[kind]}
    record.json["messages"][0]["content"] = [part, {"type": "text", "text": "what is it?"}]
    return record


def captioned_record(number: int, suffix: str) -> Record:
    record = text_record(number, caption="a cat")
    del record.json["messages"]
    record.media[suffix] = b""
    return record


@pytest.fixture
def dataset(tmp_path):
    """dataset([records of a folder], ...) -> over one folder each, set-0, set-1, ..."""

    def build(*folders: list[Record]) -> RecordDataset:
        sources = []
        for number, records in enumerate(folders):
            write_shards(records, tmp_path / f"set-{number}", overwrite=True)
            sources.append(DataSource(str(tmp_path / f"set-{number}")))
        return RecordDataset(sources, prepare=lambda record: record)

    return build


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_data_without_an_item_are_refused_by_folder(dataset, tmp_path, modality):
    others = [media_record(n, kind) for n, kind in enumerate(SUFFIXES) if kind != modality.name]
    text = [text_record(number) for number in range(5)]
    with pytest.raises(ValueError) as caught:
        check_media(
            dataset([*text, *(media_record(9 + n, k) for n, k in enumerate(SUFFIXES) if k != modality.name)], others),
            modality,
        )
    assert str(caught.value) == (
        f"{tmp_path}/set-0, {tmp_path}/set-1: none of the 9 records to train on shows {modality.plural}, which this "
        f"stage trains on: name a folder with {modality.plural} under `data`"
    )


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_one_item_among_text_is_enough(dataset, modality):
    check_media(
        dataset([text_record(n) for n in range(20)], [text_record(30), media_record(31, modality.name)]), modality
    )


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.name)
def test_a_member_that_no_message_names_is_not_shown(dataset, modality):
    unnamed = media_record(0, modality.name)
    unnamed.json["messages"][0]["content"] = "what is it?"
    suffix = SUFFIXES[modality.name]
    part = re.escape(f'{{"type": "{modality.name}", "{modality.name}": "{suffix}"}}')
    with pytest.raises(ValueError, match=f"record r000 has the member {suffix}, and its messages need a part {part}"):
        check_media(dataset([unnamed]), modality)
    check_media(dataset([unnamed]), modality, shown=lambda record: suffix in record.media)


def test_captions_show_a_picture_or_a_clip(dataset):
    check_media(dataset([captioned_record(0, "jpg")]), IMAGE)
    check_media(dataset([captioned_record(0, "clip.mp4")]), VIDEO)
    for suffix in ("jpg", "flac"):
        with pytest.raises(ValueError, match="shows utterances"):
            check_media(dataset([captioned_record(0, suffix)]), AUDIO)


def test_only_records_of_the_split_count(dataset, tmp_path):
    held_out = media_record(1, "image", split="test")
    with pytest.raises(ValueError, match="none of the 1 records"):
        check_media(dataset([text_record(0), held_out]), IMAGE)


def test_records_are_read_first_that_the_index_says_to_hold_it(dataset, monkeypatch):
    records = [text_record(n) for n in range(50)]
    data = dataset([*records, media_record(90, "audio", duration=2.5)], [media_record(91, "audio", duration=1.0)])
    read: list[int] = []
    whole = ShardSet.__getitem__
    monkeypatch.setattr(ShardSet, "__getitem__", lambda shards, row: read.append(row) or whole(shards, row))
    check_media(data, AUDIO)
    assert read == [50]


def test_samples_are_taken_from_records_with_the_medium(dataset):
    """So that a new adapter is fitted to pictures, and feature statistics are of sound, also where they are rare."""
    data = dataset(
        [text_record(n) for n in range(300)], [media_record(900 + n, "audio", duration=1.0) for n in range(3)]
    )
    assert likely_indices(data, AUDIO) == [300, 301, 302]
    assert [record.id for record in readable_samples(data, 2, likely_indices(data, AUDIO))] == ["r900", "r901"]
    assert likely_indices(data, VIDEO) == list(range(303))  # the index says nothing of clips


def test_a_broken_record_does_not_stop_the_search(dataset, tmp_path):
    data = dataset([text_record(0), media_record(1, "image")])
    (tar,) = (tmp_path / "set-0").glob("*.tar")
    tar.write_bytes(tar.read_bytes().replace(b'"id": "r000"', b'"id": r000  '))
    check_media(data, IMAGE)
