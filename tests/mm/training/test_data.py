"""The order of samples is a function of (sources, seed, position): workers, restarts and luck have no say in it."""

import io
import itertools
import json
import random
import tarfile
from collections import Counter
from functools import partial

import pytest
import torch

import mm
from mm.training.adapters import sample_costs_of
from mm.training.data import DataSource, RecordDataset, Unreadable, collate_step, step_loader
from mm.training.flops import text_token_cost
from mm.training.objectives import NextTokenObjective
from mm.training.sampler import Groups, LengthBuckets, epoch_order, step_indices
from shards.format import Record
from shards.writer import write_shards
from vision.tiling import tile_image


def first(count: int, *arguments, **options) -> list[list[int]]:
    return list(itertools.islice(step_indices(*arguments, **options), count))


def names(samples: list, groups: list[int] | None = None) -> list[str]:
    return [sample.id for sample in samples]


def name_of(record: Record) -> Record:
    return record


@pytest.fixture
def dataset(squares):
    return RecordDataset([DataSource(str(squares), split="test")], name_of)


def loaded(dataset, count: int, seed: int = 0, consumed: int = 0, workers: int = 0) -> list[list[str]]:
    loader = step_loader(dataset, names, 5, seed, consumed, workers)
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def test_each_epoch_has_each_sample_once_in_its_own_order():
    shown = list(itertools.chain(*first(15, 50, 10, 3)))
    epochs = [shown[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[1] == epoch_order(50, 3, 1).tolist()


def test_a_step_may_span_two_epochs():
    whole = list(itertools.chain(*first(14, 10, 5, 0)))
    across = list(itertools.chain(*first(10, 10, 7, 0)))
    assert across == whole  # the batch size only cuts the same sequence elsewhere
    assert all(count == 7 for count in Counter(across).values())


def test_seeds_differ_and_repeat():
    assert first(5, 50, 10, 1) == first(5, 50, 10, 1) != first(5, 50, 10, 2)


@pytest.mark.parametrize("consumed", [5, 35, 40, 1000])
def test_the_order_continues_from_any_position(consumed):
    whole = first(1000 // 5 + 20, 37, 5, 9)
    assert first(20, 37, 5, 9, consumed=consumed) == whole[consumed // 5 :][:20]


def test_workers_and_restarts_do_not_change_the_order(dataset):
    alone = loaded(dataset, 12)
    assert len(set(itertools.chain(*alone))) == 32  # all there are
    assert loaded(dataset, 12, workers=2) == alone
    assert loaded(dataset, 6, consumed=30, workers=1) == alone[6:]
    assert loaded(dataset, 12, seed=1) != alone


def test_a_source_with_a_repeat_occurs_so_often(squares):
    sources = [
        DataSource(str(squares), split="test", repeat=3),
        DataSource(str(squares), split="validation", task="vqa"),
    ]
    dataset = RecordDataset(sources, name_of)
    shown = Counter(dataset[index].id for index in range(len(dataset)))
    assert Counter(shown.values()) == {3: 32, 1: 16}
    assert all((count == 3) == (name >= "square-2000") for name, count in shown.items())


@pytest.fixture
def weighed(squares):
    """32 records of which 0.3 come in an epoch, and 16 that come 2.5 times."""
    sources = [
        DataSource(str(squares), split="test", repeat=0.3),
        DataSource(str(squares), split="validation", task="vqa", repeat=2.5),
    ]
    return RecordDataset(sources, name_of)


EPOCH = 10 + 2 * 16 + 8  # round(0.3 * 32), and 2.5 * 16


def test_a_fractional_repeat_draws_a_part_of_the_source_in_each_epoch(weighed):
    epochs, per_epoch = 60, []
    flat = itertools.chain.from_iterable(first(epochs, len(weighed), EPOCH, 3, subsamples=weighed.subsamples))
    shown = [weighed[index].id for index in flat]
    for epoch in range(epochs):
        per_epoch.append(Counter(shown[epoch * EPOCH : (epoch + 1) * EPOCH]))
        part = {name: count for name, count in per_epoch[-1].items() if name >= "square-2000"}
        rest = {name: count for name, count in per_epoch[-1].items() if name < "square-2000"}
        assert Counter(part.values()) == {1: 10} and Counter(rest.values()) == {2: 8, 3: 8}
    drawn = [frozenset(name for name in epoch if name >= "square-2000") for epoch in per_epoch]
    assert len(set(drawn)) == epochs  # another part every time
    often = Counter(itertools.chain(*drawn))
    # 60 draws of 10 in 32: 18.75 of each, with a standard deviation of 3.6
    assert len(often) == 32 and min(often.values()) > 5 and max(often.values()) < 34


def test_the_drawn_part_depends_on_seed_epoch_and_source_alone(weighed, squares):
    def drawn(dataset, epoch: int, seed: int = 3) -> set[str]:
        return {dataset[index].id for index in epoch_order(len(dataset), seed, epoch, dataset.subsamples)}

    assert drawn(weighed, 7) == drawn(weighed, 7)
    assert drawn(weighed, 7) != drawn(weighed, 8) and drawn(weighed, 7) != drawn(weighed, 7, seed=4)
    half = DataSource(str(squares), split="test", repeat=0.5)
    one, other = (epoch_order(64, 3, 7, [draw]) for draw in RecordDataset([half, half], name_of).subsamples)
    assert set(one[one < 32].tolist()) != set((other[other >= 32] - 32).tolist())  # two sources are drawn apart


def test_fractional_repeats_do_not_depend_on_workers_ranks_and_restarts(weighed):
    whole = loaded(weighed, 25)  # 125 samples: two and a half epochs
    assert loaded(weighed, 25, workers=2) == whole
    assert loaded(weighed, 12, consumed=65) == whole[13:]  # from the middle of the second epoch
    shares = []
    for rank in range(2):
        loader = step_loader(weighed, names, 5, 0, dp_rank=rank, dp_size=2)
        shares.append([step for _, step in zip(range(25), loader, strict=False)])
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == [sorted(step) for step in whole]


def test_records_of_a_group_follow_each_other(squares):
    alone = DataSource(str(squares), split="validation", task="vqa", repeat=0.5)
    dataset = RecordDataset([alone, DataSource(str(squares), split="test", group_size=4)], name_of)
    orders = [epoch_order(len(dataset), 0, epoch, dataset.subsamples, dataset.groups).tolist() for epoch in range(3)]
    for order in orders:
        assert len(order) == len(set(order)) == 8 + 32
        blocks = [index for index in order if index >= 16]
        assert all(blocks[n : n + 4] == list(range(blocks[n], blocks[n] + 4)) for n in range(0, 32, 4))
        places = [order.index(first) for first in range(16, 48, 4)]
        assert all(order[place : place + 4] == list(range(order[place], order[place] + 4)) for place in places)
    assert len({tuple(order) for order in orders}) == 3
    only = RecordDataset([DataSource(str(squares), split="test", group_size=2)], name_of)
    for step in loaded(only, 8):  # 5 samples each
        assert len(step) == 5
    whole = loaded(only, 20)
    assert loaded(only, 10, consumed=50) == whole[10:] and loaded(only, 20, workers=2) == whole


def pictures_of(dataset) -> list:
    return [image for shards in dataset.sets for image in shards.index["image_id"].to_pylist()]


@pytest.fixture
def asked(tmp_path, square_record):
    """Questions about pictures: 11, 9, 4 and 1 of them, in random order, and three records of text alone."""
    records = []
    for picture, count in enumerate((11, 9, 4, 1)):
        records += [(picture, number) for number in range(count)]
    random.Random(0).shuffle(records)
    made = []
    for position, (picture, number) in enumerate(records):
        record = square_record(picture)
        name = f"q{position:02d}-{picture}-{number}"
        made.append(Record(name, {**record.json, "id": name}, record.media))
    for number in range(3):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        about = {"id": f"t{number}", "split": "train", "task": "chat", "language": "en", "messages": messages}
        made.append(Record(f"t{number}", about))
    write_shards(made, tmp_path / "asked", samples_per_shard=10)
    return tmp_path / "asked"


def test_questions_about_one_picture_follow_each_other(asked):
    dataset = RecordDataset([DataSource(str(asked), group_by="image", group_size=4)], name_of)
    pictures, kept = pictures_of(dataset), []
    for epoch in range(4):
        order = epoch_order(len(dataset), 5, epoch, dataset.subsamples, dataset.groups).tolist()
        assert sorted(order) == list(range(28))
        runs = [list(run) for _, run in itertools.groupby(order, key=lambda index: pictures[index] or index)]
        lengths = Counter()
        for run in runs:
            lengths[pictures[run[0]]] += len(run)
        assert lengths == Counter(pictures)
        groups = [sorted(run) for run in runs if len(run) <= 4]  # two groups of a picture can meet by chance
        kept.append({tuple(group) for group in groups if len(group) == 3 or len(group) == 4})
        assert sum(len(run) == 1 for run in runs) == 4  # the picture with one question, and the texts
    assert len(set.union(*kept)) > len(kept[0]) + 8  # drawn anew
    mean = dict(zip(pictures, dataset.sharing.tolist(), strict=True))
    assert sorted(mean.values()) == [1, 1, 3, 11 / 3, 4]


def test_groups_are_as_even_as_their_limit_allows():
    keys = torch.tensor([0] * 11 + [11] * 9 + [20] * 4 + [24])
    order = epoch_order(25, 0, 0, groups=Groups(keys, torch.full((25,), 100))).tolist()
    assert [len(list(run)) for _, run in itertools.groupby(order, key=lambda index: int(keys[index]))] in list(
        map(list, itertools.permutations([11, 9, 4, 1]))
    )
    many = torch.arange(3000) // 10 * 10
    order = epoch_order(3000, 0, 0, groups=Groups(many, torch.full((3000,), 8)))
    runs = [len(list(run)) for _, run in itertools.groupby(many[order].tolist())]
    assert set(runs) <= {5, 10} and runs.count(5) > 560  # ten in two groups, which are rarely neighbours


def test_groups_by_image_do_not_depend_on_workers_ranks_and_restarts(asked, squares):
    sources = [
        DataSource(str(asked), group_by="image", group_size=5, repeat=1.5),
        DataSource(str(squares), split="test"),
        DataSource(str(squares), split="validation", group_size=2),
    ]
    dataset = RecordDataset(sources, name_of)
    whole = loaded(dataset, 40)  # two epochs and more
    assert loaded(dataset, 40, workers=2) == whole and loaded(dataset, 15, consumed=125) == whole[25:]
    costs = torch.ones(len(dataset))
    for size in (2, 3):
        loaders = [step_loader(dataset, list_groups, 5, 0, 0, 0, rank, size, costs) for rank in range(size)]
        for step, *shares in zip(whole, *loaders, strict=False):
            assert sorted(name for share in shares for name, _ in share) == sorted(step)
            assert all(len(share) <= -(-5 // size) for share in shares)


def list_groups(samples: list, groups: list[int]) -> list[tuple[str, int]]:
    return list(zip(names(samples), groups, strict=True))


def test_a_step_encodes_each_picture_in_one_micro_batch(asked, tiny_processor):
    """Steps of 10 in micro-batches of 5; a picture is in two of them only where no one has room for its questions."""
    dataset = RecordDataset([DataSource(str(asked), group_by="image", group_size=3)], tiny_processor.record_example)
    objective = NextTokenObjective()
    collate = partial(collate_step, objective=objective, micro_batch_size=5)
    for step, _ in zip(step_loader(dataset, collate, 10, 1), range(6), strict=False):
        encoded = [tiles.pixels.sum().item() for batch in step.batches for tiles in batch.images]
        assert len(encoded) - len(set(encoded)) <= 1
        assert step.amounts["samples"] == 10 and step.amounts["images"] == len(encoded) < 10


def test_groups_by_image_need_a_size(squares):
    with pytest.raises(ValueError, match=r"group_by of .* is image and group_size is 1"):
        RecordDataset([DataSource(str(squares), group_by="image")], name_of)


def test_length_buckets_put_samples_of_similar_length_into_a_step():
    lengths = torch.rand(103, generator=torch.Generator().manual_seed(1))
    buckets = LengthBuckets(lengths, 10, 5)
    for epoch in (0, 1, 7):
        order = epoch_order(103, 0, epoch, buckets=buckets)
        assert sorted(order.tolist()) == list(range(103))
        assert torch.equal(order, epoch_order(103, 0, epoch, buckets=buckets))
        plain, begun = epoch_order(103, 0, epoch), -103 * epoch % 10
        windows = [set(window.tolist()) for window in plain[begun:].split(50)]
        for step in order[begun:].split(10):  # each out of one window
            assert any(set(step.tolist()) <= window for window in windows)
    assert not torch.equal(order, epoch_order(103, 0, 1, buckets=buckets))

    def spread(steps_of_epochs: list[list[int]]) -> list[float]:
        return [float(lengths[step].max() - lengths[step].mean()) for step in steps_of_epochs]

    sequence, drawn = first(40, 103, 10, 0, buckets=buckets), first(40, 103, 10, 0)  # nearly four epochs
    assert sum(spread(sequence)) < 0.5 * sum(spread(drawn))
    assert sum(value > 0.3 for value in spread(sequence)) <= 3  # those that span two epochs
    longest = [float(lengths[step].max()) for step in sequence[:10]]
    assert longest != sorted(longest)  # steps come in any order
    assert first(18, 103, 10, 0, 70, buckets=buckets) == sequence[7:25]
    assert sorted(first(3, 4, 10, 0, buckets=LengthBuckets(lengths, 10, 5))[0])  # a set smaller than a step


def test_length_buckets_need_durations_and_no_groups(squares):
    for source, reason in (
        (DataSource(str(squares)), "have no durations"),
        (DataSource(str(squares), group_size=2), "group_size"),
    ):
        with pytest.raises(ValueError, match=f"length_bucket_steps is 4, and .*{reason}"):
            step_loader(RecordDataset([source], lambda record: record), list, 4, 0, length_bucket_steps=4)


def test_an_integer_repeat_equals_naming_the_source_so_often(squares):
    twice = RecordDataset([DataSource(str(squares), split="test", repeat=2.0)], name_of)
    named = RecordDataset([DataSource(str(squares), split="test")] * 2, name_of)
    assert loaded(twice, 20) == loaded(named, 20) and not twice.subsamples


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"split": "training"}, "no records of split 'training'; it has test, train, validation"),
        ({"task": "asr"}, "no records of task 'asr'"),
        ({"repeat": 0}, "repeat .* is 0; it must be above 0"),
        ({"repeat": float("nan")}, "repeat .* is nan; it must be above 0"),
        ({"repeat": 0.001}, "it uses none of the 192 records: it must be at least 0.0052"),
        ({"path": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_impossible_sources_are_refused(squares, source, message):
    with pytest.raises(ValueError, match=message):
        RecordDataset([DataSource(**{"path": str(squares), **source})], name_of)


def test_an_empty_list_of_sources_is_refused():
    with pytest.raises(ValueError, match="no data"):
        RecordDataset([], name_of)


def test_a_source_without_records_is_refused(tmp_path, square_record):
    write_shards([square_record(0)], tmp_path / "set")
    (tmp_path / "set" / "index.parquet").unlink()
    (tmp_path / "set" / "000000.tar").write_bytes(bytes(10240))  # a tar's end mark alone
    with pytest.raises(ValueError, match="no records"):
        RecordDataset([DataSource(str(tmp_path / "set"), split=None)], name_of)


def test_records_that_cannot_be_prepared_are_unreadable(tmp_path, square_record, tiny_processor):
    good, cut, foreign = square_record(1), square_record(2), square_record(3)
    cut.media["png"] = cut.media["png"][:200]
    foreign.json["messages"][0]["content"] = [{"type": "text", "text": "?"}, {"type": "clip", "clip": "png"}]
    write_shards([good, cut, foreign], tmp_path / "set")
    dataset = RecordDataset([DataSource(str(tmp_path / "set"))], tiny_processor.record_example)
    assert dataset[0].images
    assert (
        isinstance(dataset[1], Unreadable) and dataset[1].record == "square-0002" and "truncated" in dataset[1].reason
    )
    assert isinstance(dataset[2], Unreadable) and "clip" in dataset[2].reason


def test_a_record_with_half_a_surrogate_pair_is_unreadable(tmp_path, tiny_processor):
    """JSON can spell it, and no tokenizer takes it."""
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for name, answer in (("cut", "a \ud83d b"), ("whole", "a \U0001f600 b")):
            messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
            text = json.dumps({"id": name, "split": "train", "messages": messages}).encode()
            member = tarfile.TarInfo(f"{name}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    dataset = RecordDataset([DataSource(str(tmp_path))], tiny_processor.record_example)
    assert isinstance(dataset[0], Unreadable) and dataset[0].record == "cut"
    assert "message 1 holds half of a surrogate pair, '\\ud83d', at character 2" in dataset[0].reason
    assert isinstance(dataset[1], mm.Sample)


def test_a_record_with_any_other_error_is_unreadable(squares):
    def prepare(record: Record, broken: str):
        if record.id == broken:
            raise KeyError("caption")  # such as a picture of a foreign set, without any text
        return record

    source = DataSource(str(squares), split="test")
    dataset = RecordDataset([source], partial(prepare, broken="square-2003"))
    assert dataset[3] == Unreadable("square-2003", "KeyError: 'caption'")
    assert dataset[4].id == "square-2004"


def test_a_record_missing_in_the_shard_is_unreadable(tmp_path, square_record):
    write_shards([square_record(n) for n in range(3)], tmp_path / "set")
    dataset = RecordDataset([DataSource(str(tmp_path / "set"))], name_of)
    tar = tmp_path / "set" / "000000.tar"
    content = bytearray(tar.read_bytes())
    offset = dataset.sets[0].index["offset"][1].as_py()
    content[offset : offset + 512] = b"\xff" * 512  # the header of the second record's first member
    tar.write_bytes(content)
    assert isinstance(dataset[1], Unreadable) and dataset[1].record == "square-0001"
    assert [dataset[0].id, dataset[2].id] == ["square-0000", "square-0002"]


def test_sample_costs_come_from_the_index(tmp_path, random_picture, square_record, tiny_config):
    """Tiles, a caption's characters divided by four, and 0 for messages; the cost of all in vision tokens."""
    sizes, captions = [(28, 28), (100, 28), (60, 60)], ["noise of any colour", "noise", "so much noise " * 20]
    records = []
    for number, (size, caption) in enumerate(zip(sizes, captions, strict=True)):
        out = io.BytesIO()
        random_picture(*size).save(out, format="png")
        about = {"id": f"p{number}", "split": "train", "task": "caption", "language": "en", "caption": caption}
        records.append(Record(f"p{number}", about, {"png": out.getvalue()}))
    write_shards([*records, square_record(1)], tmp_path / "set")
    dataset = RecordDataset([DataSource(str(tmp_path / "set"), repeat=1.4)], lambda record: record)
    tiles = [*(tile_image(random_picture(*size), 28, 4).num_tiles for size in sizes), 1]
    tokens = [*(len(caption) / 4 for caption in captions), 0]
    assert dataset.num_tiles(28, 4).tolist() == tiles * 2 and len(set(tiles)) > 1
    assert dataset.num_tokens().tolist() == tokens * 2
    cost = text_token_cost(tiny_config)
    expected = [5 * count + cost * length for count, length in zip(tiles, tokens, strict=True)]  # 4 patches and a CLS
    assert sample_costs_of(dataset, tiny_config, 4).tolist() == pytest.approx(expected * 2, abs=0.5)


def test_max_tokens_splits_a_step_of_long_samples():
    samples = [mm.Sample([5] * length, [5] * length) for length in (30, 4, 9, 4, 8)]
    batches = collate_step(samples, NextTokenObjective(), None, max_tokens=16).batches
    assert [batch.lengths.tolist() for batch in batches] == [[4, 4], [8], [9], [30]]
