"""Sources whose pictures are replaced by grey ones."""

from mm.training.data import DataSource, RecordDataset


def test_a_blank_source_shows_grey_pictures_with_the_same_text(squares, tiny_processor):
    sources = [DataSource(str(squares), split="test", repeat=0.5, blank_images=blank) for blank in (False, True)]
    dataset = RecordDataset(sources, tiny_processor.record_example)
    for index in range(32):
        seen, blank = dataset[index], dataset[32 + index]
        assert seen.tokens == blank.tokens and seen.labels == blank.labels
        assert seen.images[0].grid == blank.images[0].grid and seen.images[0].pixels.unique().numel() > 1
        assert (blank.images[0].pixels == 128).all()


def test_a_blank_source_is_refused_where_no_adapter_trains(squares):
    dataset = RecordDataset([DataSource(str(squares), blank_images=True)], lambda record: record)
    assert "trains no adapter" in dataset[0].reason
