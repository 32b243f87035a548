from data_prep.sources.splits import join_concepts, split_of


def test_shares_of_splits_and_dependence_on_names_alone():
    splits = [split_of(f"concept {i}", validation=0.02, test=0.08) for i in range(5000)]
    assert abs(splits.count("validation") / 5000 - 0.02) < 0.008
    assert abs(splits.count("test") / 5000 - 0.08) < 0.015
    assert splits == [split_of(f"concept {i}", validation=0.02, test=0.08) for i in range(5000)]
    assert {split_of(str(i), validation=0.0, test=0.0) for i in range(100)} == {"train"}


def test_concepts_are_joined_through_other_concepts():
    pairs = [("b", "1"), ("c", "1"), ("c", "2"), ("a", "2"), ("d", "3"), ("a", "a"), ("3", "4")]
    expected = {"a": "a", "b": "a", "c": "a", "d": "d", "3": "3"}
    assert join_concepts(pairs) == expected == join_concepts(reversed(pairs))
