"""The tiny model with every modality and a context that holds long answers."""

from dataclasses import replace

import pytest

import mm


@pytest.fixture(scope="session")
def served_config(everything_config) -> mm.ModelConfig:
    return replace(everything_config, language_model=replace(everything_config.language_model, context=1024))


@pytest.fixture(scope="session")
def served_model(build_model, served_config) -> mm.MultimodalModel:
    return build_model(served_config, seed=3)


@pytest.fixture(scope="session")
def served_processor(tokenizer, served_config) -> mm.Processor:
    return mm.Processor(tokenizer, served_config)
