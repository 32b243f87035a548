"""How a stage trains: the settings that all stages have in common, checked when they are read."""

import math
from dataclasses import dataclass, field

from foundation.errors import UserError

# What a run that goes on may do in another way.
FREE_TO_CHANGE = (
    "log_every",
    "evaluate_every",
    "save_every",
    "keep",
    "workers",
    "dp_shard",
    "tp_degree",
    "pp_degree",
    "rank_timeout",
)


@dataclass
class TrainingConfig:
    """How a stage trains.

    Attributes:
        steps: optimizer steps in all.
        batch_size: samples per step, over all ranks. micro_batch_size: samples per forward pass of a rank; null takes
            its whole share.
        micro_batch_tokens: the most tokens that a forward pass holds, padding counted (of an encoder's own stage: mel
            frames), so that long samples come few at a time and short ones many; null sets no limit. One process only,
            and `mm plan` reckons without it.
        learning_rates: name pattern -> learning rate; the first that fits decides, null freezes.
        warmup_steps, final_learning_rate_factor: linear warm-up, then a cosine down to this share of the learning_rates.
        precision: "fp32" or "bf16" (autocast; weights, gradients and optimizer stay FP32).
        activation_checkpointing: compute layers anew in the backward pass instead of keeping their activations.
        compile: run layers through `torch.compile`, which needs a C++ compiler. Rounding then goes by what sizes come
            first: a run that is taken up again ends as the uninterrupted one to rounding, not bit for bit.
        spike_factor: leave out a step whose gradient norm is this many times the median of recent ones; null leaves out
            only what is not finite.
        max_skipped: steps in a row that may be left out before the run stops.
        log_every, evaluate_every, save_every: in steps. keep: newest checkpoints that stay.
        length_bucket_steps: so many steps' samples are sorted by their seconds before they are cut into steps, whose order is
            then drawn: less padding of sound. 1 leaves all as drawn.
        workers: processes that read and decode, per rank; they do not change the order.
        dp_shard: under torchrun, how many ranks share one copy of the weights (FSDP); null: all that read different
            samples. tp_degree: how many share each product. pp_degree: how many share the layers, in order.
        rank_timeout: seconds after which ranks that do not come to a step end the run, by number.
    """

    steps: int
    batch_size: int
    learning_rates: dict[str, float | None] = field(default_factory=dict)
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    warmup_steps: int = 0
    final_learning_rate_factor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    precision: str = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False
    spike_factor: float | None = None
    max_skipped: int = 10
    log_every: int = 10
    evaluate_every: int = 100
    save_every: int = 100
    keep: int = 2
    length_bucket_steps: int = 1
    workers: int = 1
    dp_shard: int | None = None
    tp_degree: int = 1
    pp_degree: int = 1
    rank_timeout: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "save_every", "keep", "length_bucket_steps")
        for name in (*counts, "tp_degree", "pp_degree"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "final_learning_rate_factor", "weight_decay", "max_skipped", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("max_gradient_norm", "rank_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be above 0")
        if self.compile and self.tp_degree * self.pp_degree > 1:
            raise UserError(
                "training.compile is for whole layers on ranks that run all of them: leave training.tp_degree and "
                "training.pp_degree at 1"
            )
        if self.dp_shard is not None and self.dp_shard < 1:
            raise UserError(f"training.dp_shard is {self.dp_shard}; it must be at least 1, or null")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise UserError(f"training.spike_factor is {self.spike_factor}; it must be above 1, or null")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"training.betas are {self.betas}; both must lie in [0, 1)")
        for pattern, rate in self.learning_rates.items():
            if rate is not None and not 0 <= rate < math.inf:
                raise UserError(
                    f"training.learning_rates of {pattern!r} is {rate}; it must be 0 or more, or null to freeze"
                )
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise UserError(
                f"training.micro_batch_size is {self.micro_batch_size}; it can be "
                f"1 to the batch_size, {self.batch_size}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise UserError(f"training.micro_batch_tokens is {self.micro_batch_tokens}; it must be at least 1, or null")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"training.precision is {self.precision!r}; it can be fp32 or bf16")
