"""A randomly initialised model on any device, samples for it, a training step, and greedy decoding."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

import mm
from mm.inference import Engine, Request
from mm.training.config import TrainingConfig
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.metrics import StepMetrics
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.trainer import train_step
from vision.tiling import Tiles

GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
LEARNING_RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-5}


def random_model(
    config: mm.ModelConfig, device: torch.device | str, frozen_in_bf16: bool = False
) -> mm.MultimodalModel:
    """A model with random weights, made on the device. All gates are open; the language model is frozen.

    Args:
        frozen_in_bf16: keep the language model's linear layers in bf16, as `mm.training.precision` does.
    """
    with torch.device("meta"):
        model = mm.MultimodalModel(config)
    for module in model.language_model.modules():
        if frozen_in_bf16 and isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    model.to_empty(device=device)
    apply_learning_rates(model, LEARNING_RATES)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model


def random_samples(tile_size: int, vocab_size: int, text_tokens: int, num_rows: int, num_tiles: int) -> list[mm.Sample]:
    """Rows of random text after one image of random tiles; every token but the placeholder is a target."""
    generator = torch.Generator().manual_seed(num_rows + 10 * num_tiles)
    samples = []
    for _ in range(num_rows):
        size = (num_tiles, 3, tile_size, tile_size)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        text = torch.randint(3, vocab_size, (text_tokens - 1,), generator=generator).tolist()
        samples.append(mm.Sample([vocab_size, *text], [-100, *text], images=[Tiles(pixels, GRIDS[num_tiles])]))
    return samples


def adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    return build_optimizer(model, apply_learning_rates(model, LEARNING_RATES), config.weight_decay, config.betas)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[mm.Sample],
    config: TrainingConfig,
    device: torch.device | str,
) -> Callable[[], StepMetrics]:
    """An optimizer step over the samples, in micro-batches of `config`; they are copied from the CPU."""
    objective = NextTokenObjective()
    batches = collate_step(list(samples), objective, config.micro_batch_size).batches
    return partial(train_step, model, objective, optimizer, batches, config, device, Guard(None, 0))


def decoding_seconds(model: mm.MultimodalModel, samples: Sequence[mm.Sample], steps: int) -> float:
    """Seconds of greedy decoding steps, without the pass over the prompts."""
    engine = Engine(model, len(samples), read_late=False)
    for sample in samples:
        engine.submit(Request(sample, steps + 1, ()))
    times = []
    while not engine.is_idle:
        engine.step()
        times.append(time.perf_counter())
    assert len(times) == steps + 1
    return times[-1] - times[0]


def step_bytes(model: mm.MultimodalModel, num_rows: int, text_tokens: int, vision_tokens: int) -> int:
    """The fewest bytes that a decoding step reads: weights once, each row's cached keys and values once."""
    unused = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.k_norm")  # k, v are cached
    parts = [*model.language_model.named_parameters(), *model.image_adapter.blocks.named_parameters()]
    weights = sum(weight.nbytes for name, weight in parts if not any(part in name for part in unused))
    config = model.config.language_model
    cached = config.num_layers * text_tokens + len(model.image_adapter.blocks) * vision_tokens
    size = model.language_model.model.norm.weight.element_size()
    return weights + size * num_rows * cached * 2 * config.num_kv_heads * config.head_dim
