"""The settings of training that all stages have in common, checked when they are read."""

import math
from dataclasses import dataclass, field

from foundation.errors import UserError
from mm.parallel.layout import Layout

# Settings that may differ when an interrupted run is resumed.
NOT_IN_FINGERPRINT = (
    "log_every",
    "evaluate_every",
    "save_every",
    "keep",
    "workers",
    "dp_shard",
    "tp",
    "pp",
    "rank_timeout",
    "offload_optimizer",
    "offload_frozen",
    "peak_tflops",
)


@dataclass
class TrainingConfig:
    """How a stage trains.

    Attributes:
        steps: the number of optimizer steps.
        batch_size: samples per step, over all ranks.
        learning_rates: name pattern -> learning rate; the first pattern that matches decides, null freezes.
        micro_batch_size: samples per forward pass of a rank; null takes its whole share of the step.
        micro_batch_tokens: the largest number of tokens in a forward pass, padding included (in an encoder's own stage,
            mel frames): fewer long samples than short ones per pass. Null sets no limit. One process only; `mm plan`
            ignores it.
        warmup_steps: of a linear warm-up of the learning rates.
        final_learning_rate_factor: where the cosine after the warm-up ends, as a factor of the learning rates.
        weight_decay, betas: of AdamW.
        max_gradient_norm: gradients above it are scaled down to it.
        precision: "fp32" or "bf16" (autocast; weights, gradients and optimizer state stay FP32).
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: run layers through `torch.compile`, which needs a C++ compiler. Its rounding depends on the sizes that
            come first, so a resumed run ends as the uninterrupted one up to rounding, not bit for bit.
        spike_factor: skip a step whose gradient norm is this many times the median of recent ones; null skips only
            what is not finite.
        max_skipped: steps in a row that may be skipped before the run stops.
        log_every, evaluate_every, save_every: in steps.
        keep: the number of newest checkpoints to keep.
        length_bucket_steps: sort the samples of this many steps by their seconds before they are split into steps, and
            shuffle the steps, for less padding of sound. 1 does not sort.
        workers: processes per rank that read and decode; the order does not depend on them.
        dp_shard: under torchrun, ranks that share one copy of the weights (FSDP); null: all data-parallel ranks.
        tp: ranks that share each matrix product (tensor parallelism).
        pp: ranks that share the layers, in order (pipeline parallelism).
        rank_timeout: seconds that ranks wait for each other at a step before the run fails and names the missing ones.
        seed: of the order of samples and of everything random.
        muon: name patterns; Muon steps the matrices among the parameters that they match, with their learning rates, in
            place of AdamW. One process only.
        optimizer_state: "8bit" stores AdamW's moments in 8 bit; null: FP32. One process only.
        offload_optimizer: keep FP32 weights, gradients and moments in the host's memory, and step there. One process
            only.
        offload_frozen: keep the language model's layers in the host's memory, and copy one at a time to the device. One
            process only.
        frozen_language_model: "bf16" rounds the matrices of a frozen language model that is stored in FP32, such as a
            GGUF file's; precision must be bf16. "int8" or "fp8" stores the matrices of its layers in 8 bits, with a
            scale per output channel, while the stage trains, in one process only. Null leaves them as they are.
        peak_tflops: the device's specified TFLOP/s of matrix products in this precision, of which `mfu` is a share;
            null looks it up by the device's name.
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
    tp: int = 1
    pp: int = 1
    rank_timeout: float = 300.0
    seed: int = 0
    muon: list[str] = field(default_factory=list)
    optimizer_state: str | None = None
    offload_optimizer: bool = False
    offload_frozen: bool = False
    frozen_language_model: str | None = None
    peak_tflops: float | None = None

    @property
    def savings(self) -> list[str]:
        """The settings that save memory in one process, as far as they are on."""
        values = {"optimizer_state": bool(self.optimizer_state), "offload_optimizer": self.offload_optimizer}
        values |= {"offload_frozen": self.offload_frozen, "frozen_language_model": self.in_8_bits is not None}
        return [name for name, on in values.items() if on]

    @property
    def in_8_bits(self) -> str | None:
        """How the frozen language model's matrices are stored in 8 bits; None: they are not."""
        return None if self.frozen_language_model == "bf16" else self.frozen_language_model

    def layout(self, num_ranks: int) -> Layout:
        """The arrangement of so many ranks.

        Raises:
            UserError: the degrees do not divide the number of ranks.
        """
        return Layout.of(num_ranks, self.dp_shard, self.tp, self.pp)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "log_every", "evaluate_every", "save_every", "keep", "length_bucket_steps")
        for name in (*counts, "tp", "pp"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "final_learning_rate_factor", "weight_decay", "max_skipped", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("max_gradient_norm", "rank_timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be above 0")
        if self.compile and self.tp * self.pp > 1:
            raise UserError(
                "training.compile works without tensor and pipeline parallelism: leave training.tp and training.pp at 1"
            )
        for name in ("dp_shard", "micro_batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1, or null")
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
                f"training.micro_batch_size is {self.micro_batch_size}; it can be 1 to the batch_size, "
                f"{self.batch_size}"
            )
        stored = {"optimizer_state": (None, "8bit"), "frozen_language_model": (None, "bf16", "int8", "fp8")}
        for name, choices in stored.items():
            if getattr(self, name) not in choices:
                known = " or ".join("null" if choice is None else choice for choice in choices)
                raise UserError(f"training.{name} is {getattr(self, name)!r}; it can be {known}")
        if self.optimizer_state is not None and self.offload_optimizer:
            raise UserError(
                "training.optimizer_state is 8bit and training.offload_optimizer is true: the host holds FP32 moments; "
                "take one of the two"
            )
        if self.muon and (self.optimizer_state is not None or self.offload_optimizer):
            other = "offload_optimizer" if self.offload_optimizer else "optimizer_state"
            raise UserError(f"training.muon and training.{other} do not go together: take one of the two")
        if self.compile and self.offload_frozen:
            raise UserError("training.compile works without training.offload_frozen: set one of them to false")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UserError(f"training.peak_tflops is {self.peak_tflops}; it must be above 0, or null")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"training.precision is {self.precision!r}; it can be fp32 or bf16")
        if self.frozen_language_model == "bf16" and self.precision != "bf16":
            raise UserError(
                f"training.frozen_language_model is bf16 and training.precision is {self.precision}, which computes in "
                "FP32: set training.precision to bf16, or training.frozen_language_model to null"
            )
