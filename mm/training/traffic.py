"""What a rank will send to the others in a step, and how long that may take: from shapes alone.

`mm.parallel.traffic` says how messages are counted, and counts those of a run.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mm.cross_attention import CrossAttentionBlock
from mm.language_model import DecoderLayer
from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.tables import shares_head
from mm.parallel.tensor_parallel import partial_parameters
from mm.parallel.traffic import Traffic
from vision.encoder import EncoderLayer

EXCHANGED: tuple[type[nn.Module], ...] = (DecoderLayer, CrossAttentionBlock, EncoderLayer)  # parts of their results


@dataclass(frozen=True)
class Links:
    """How fast GPUs exchange tensors.

    Attributes:
        node: GB/s from one GPU to another of its node, in one direction. network: GB/s of each GPU to other nodes.
        node_size: GPUs of a node. message_seconds: that a message takes besides its bytes.
        overlapped: weights and gradients travel while matrix products run.
    """

    node: float
    network: float = 50.0  # 400 Gb/s for each GPU
    node_size: int = 8
    message_seconds: float = 20e-6
    overlapped: bool = True

    def seconds(self, traffic: Traffic, layout: Layout) -> dict[str, float]:
        """What a rank's messages take: axis of the layout -> seconds of a step."""
        found, stride = {}, 1
        for axis in ("tp", "dp_shard", "dp_replicate", "pp"):  # neighbours in "tp" have consecutive numbers
            ranks = getattr(layout, axis)
            rate = self.node
            if stride * ranks > self.node_size:
                # A ring through several members of a node uses the network link of each; a pipeline sends to one rank.
                members = 1 if axis == "pp" else min(ranks, max(1, self.node_size // stride))
                rate = min(self.node, self.network * members)
            found[axis] = traffic.sent[axis] / rate / 1e9 + traffic.messages[axis] * self.message_seconds
            stride *= ranks
        return found

    def step_seconds(self, products: float, traffic: Traffic, layout: Layout, num_micro_batches: int) -> float:
        """An estimate of the seconds of a step.

        Args:
            products: seconds of a rank's matrix products.
        """
        sent = self.seconds(traffic, layout)
        weights = sent["dp_shard"] + sent["dp_replicate"]
        busy = (max(products, weights) if self.overlapped else products + weights) + sent["tp"]
        fill = (num_micro_batches + layout.pp - 1) / num_micro_batches  # a pipeline fills and drains
        return busy * fill + sent["pp"]


@dataclass(frozen=True)
class Call:
    """A run of a module in the forward pass of a micro-batch.

    Attributes:
        name: of the module. shape: of its first input. width: bytes of each of its output's numbers.
        backward: its output needs a gradient.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    width: int
    backward: bool


@contextmanager
def recorded_calls(model: nn.Module, kinds: tuple[type[nn.Module], ...], calls: list[Call]) -> Iterator[None]:
    """Context that appends each run of the modules of some kinds, and of those whose results ranks exchange."""

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        first = next((part for part in tree_leaves(inputs) if isinstance(part, Tensor)), tensors[0])
        backward = any(tensor.requires_grad for tensor in tensors)
        calls.append(Call(name, module, tuple(first.shape), tensors[0].element_size(), backward))

    hooks = []
    for name, module in model.named_modules():
        exchanged = isinstance(module, EXCHANGED) or name in ("language_model.lm_head", "image_adapter.projection")
        if exchanged or isinstance(module, kinds):
            hooks.append(
                module.register_forward_hook(lambda part, inputs, output, name=name: record(name, part, inputs, output))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class ModuleBytes:
    """What the ranks of `dp_shard` exchange of one FSDP module.

    Attributes:
        gathered: bytes of its weights, as they are gathered. trained: of the gradients of its weights, in FP32.
        shared: of the gradients of those that several pipeline stages hold, of one rank's shard.
    """

    gathered: float
    trained: float
    shared: Sequence[int] = ()


def traffic_of_step(
    model: nn.Module,
    modules: dict[str, ModuleBytes],
    calls: Sequence[Call],
    layout: Layout,
    num_micro_batches: int,
    activation_checkpointing: bool,
    hidden: tuple[int, ...] | None = None,
) -> Traffic:
    """What a rank sends in a step's passes.

    Args:
        model: the rank's part of it. modules: name of each FSDP module -> its bytes; "" is the root.
        calls: of a micro-batch's forward pass.
        hidden: the shape of the hidden states that go to the next stage of a pipeline, in FP32.
    """
    traffic = Traffic()
    _weights(traffic, modules, calls, layout, num_micro_batches)
    if layout.tp > 1:
        _products(traffic, model, calls, layout, num_micro_batches, activation_checkpointing)
    if layout.pp > 1:
        assert hidden is not None
        traffic.add("pp", 4 * math.prod(hidden), num_micro_batches)
        for module in modules.values():
            for size in module.shared:
                traffic.all_reduce("pp", 4 * size, layout.pp)
    return traffic


def _weights(
    traffic: Traffic, modules: dict[str, ModuleBytes], calls: Sequence[Call], layout: Layout, num_micro_batches: int
) -> None:
    """FSDP: a module is gathered for its forward and its backward pass.

    The backward pass of each module gathers the one that ran before it as well, needed or not. In a pipeline, modules
    stay gathered after a backward pass until their next forward pass, and gradients are reduced once per step.
    """
    shard, replicate, staged = layout.dp_shard, layout.dp_replicate, layout.pp > 1
    times = Counter(call.name for call in calls if call.name in modules)
    order = list(times)
    needed = {call.name for call in calls if call.backward}
    again = {name for name, later in zip(order, [*order[1:], None], strict=True) if {name, later} & needed}
    for name, module in modules.items():
        if name and name not in order:  # it does not run
            continue
        if name:
            gathers = num_micro_batches * times[name] + (1 if staged else num_micro_batches) * (name in again)
        else:
            gathers = 1 if staged else num_micro_batches
        reductions = 1 if staged else num_micro_batches
        if shard > 1:
            traffic.gather_or_scatter("dp_shard", module.gathered, shard, gathers)
            traffic.gather_or_scatter("dp_shard", module.trained, shard, reductions * (module.trained > 0))
        if replicate > 1:
            traffic.all_reduce("dp_replicate", module.trained / shard, replicate, reductions * (module.trained > 0))


def _products(
    traffic: Traffic,
    model: nn.Module,
    calls: Sequence[Call],
    layout: Layout,
    num_micro_batches: int,
    activation_checkpointing: bool,
) -> None:
    """Tensor parallelism: sums that end each pair of products, and in the image encoder tokens gathered before them.

    A layer that computes its activations again stops before its last sum, unless a gate behind it needs that.
    """
    tp = layout.tp
    shared_head = isinstance(model, MultimodalModel) and shares_head(model.language_model, tp)
    for call in calls:
        again = call.backward and activation_checkpointing
        if isinstance(call.module, EncoderLayer):
            images, tokens, channels = call.shape
            whole = images * -(-tokens // tp) * tp * channels * call.width
            times = 1 + call.backward
            repeated = (3 if call.module.gate_ffn is None else 4) * again
            traffic.gather_or_scatter("tp", whole, tp, num_micro_batches * (5 * times + repeated))
        elif isinstance(call.module, (DecoderLayer, CrossAttentionBlock)):
            repeated = (1 if isinstance(call.module, DecoderLayer) else 2) * again
            times = 2 + 2 * call.backward + repeated
            traffic.all_reduce("tp", math.prod(call.shape) * call.width, tp, num_micro_batches * times)
        elif isinstance(call.module, nn.Linear) and call.name == "language_model.lm_head":
            if not shared_head:
                continue
            rows = math.prod(call.shape[:-1])
            traffic.gather_or_scatter("tp", rows * call.module.out_features * call.width, tp, num_micro_batches)
            if call.backward:
                traffic.all_reduce("tp", math.prod(call.shape) * call.width, tp, num_micro_batches)
        elif isinstance(call.module, nn.Linear) and call.backward:  # the projection of vision tokens
            whole = 4 * math.prod(call.shape[:-1]) * call.module.out_features
            traffic.all_reduce("tp", whole, tp, num_micro_batches)
    partial = [parameter.shape for parameter in partial_parameters(model) if parameter.requires_grad]
    if partial:
        numbers = sum(math.ceil(first / layout.dp_shard) * math.prod(others) for first, *others in partial)
        traffic.all_reduce("tp", 4 * numbers, tp)
