"""Pipeline parallelism for offline generation: each rank runs some of the layers, on several micro-batches in turn.

The stages are those of training (`pipeline.py`). Requests are dealt to micro-batches, each an engine of its own over
one pool of pages. All ranks step the same engines in the same order: while one stage runs a micro-batch, the stage
before it runs the next one. The last stage draws the tokens and sends them to the others, who take them when that
micro-batch has its next turn.
Shapes: B rows, T tokens of a pass, D width of the language model, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from foundation.errors import UserError
from layers.attention import DecodeStep
from mm.batch import Batch
from mm.inference.engine import Engine
from mm.inference.pages import TEXT, PagePool
from mm.inference.readout import Emitted
from mm.inference.request import Request
from mm.inference.state import DecodeState, draw, move_on, step_logits
from mm.modalities import IMAGE
from mm.model import Cache, MultimodalModel
from mm.parallel.pipeline import layers_of_stages, take_part
from mm.vision_context import VisionContexts


class InferenceStage(MultimodalModel):
    """The part of a model that one rank of a pipeline holds, to generate with; all ranks must make the same passes.

    It takes over the model's modules. Hidden states that leave the last stage are the model's; on the other stages they
    only have its shape.

    Args:
        group: the ranks of the pipeline.

    Attributes:
        page_layers: of a pool of pages, see `mm.inference.pages.PagePool`.

    Raises:
        UserError: a model that cannot be split, or more stages than units.
    """

    def __init__(self, model: MultimodalModel, group: dist.ProcessGroup) -> None:
        layers = layers_of_stages(model, dist.get_world_size(group))
        with torch.device("meta"):  # no storage: every module is replaced below
            super().__init__(model.config)
        self.rank, self.num_stages, self.group = dist.get_rank(group), len(layers), group
        self.own_layers = layers[self.rank]
        assert model.image_adapter is not None
        depths = [max(position - 1, 0) for position in model.image_adapter.positions]
        self.page_layers = {
            TEXT: max(map(len, layers)),
            IMAGE.name: max(sum(depth in stage for depth in depths) for stage in layers),
        }
        take_part(self, model, self.own_layers)
        self.eval()
        self._sent: list[tuple[dist.Work, Tensor]] = []  # tensors must live until they have arrived

    @property
    def is_last(self) -> bool:
        """Whether this stage draws the tokens."""
        return self.rank == self.num_stages - 1

    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Raises UserError: a stage generates, and scores no given text."""
        raise UserError("one stage of a pipeline scores no given answers: load the model with pp 1")

    def embed(self, tokens: Tensor) -> Tensor:
        """See `MultimodalModel.embed`; without values on all stages but the first."""
        if self.rank == 0:
            return super().embed(tokens)
        return self.extra_embeddings.new_empty(*tokens.shape, self.config.language_model.hidden_size)

    def run_layers(
        self,
        x: Tensor,
        positions: Tensor,
        contexts: VisionContexts,
        cache: Cache | None = None,
        step: DecodeStep | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """See `MultimodalModel.run_layers`: the previous stage's output through this stage, and on to the next."""
        assert layers is None, "a stage runs its own layers"
        if self.rank > 0:
            dist.recv(x, group=self.group, group_src=self.rank - 1)
        dtype = x.dtype
        x = super().run_layers(x, positions, contexts, cache, step, self.own_layers)
        if not self.is_last:
            self.send(x.to(dtype).contiguous(), self.rank + 1)
        return x

    def send(self, tensor: Tensor, stage: int) -> None:
        """Send a tensor without waiting for its arrival."""
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        work = dist.isend(tensor, group=self.group, group_dst=stage)
        assert work is not None
        self._sent.append((work, tensor))

    def finish_sending(self) -> None:
        """Wait until everything has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []


@dataclass
class Drawn:
    """Tokens that the last stage has drawn, on their way to this one.

    Attributes:
        tokens: int64 [B]. work: what fills them. drawing: as of `state.move_on`.
        emitted: what each row emitted, once the state has moved on.
    """

    state: DecodeState
    tokens: Tensor
    work: dist.Work | None
    drawing: Tensor | None
    emitted: list[list[int]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait for the tokens, and let the state move on."""
        if not self.emitted:
            if self.work is not None:
                self.work.wait()
            move_on(self.state, self.tokens, torch.zeros_like(self.state.joint), self.drawing)
            self.emitted = self.state.emitted[:, None].tolist()

    def tolist(self) -> list[list[int]]:
        """See `Emitted`."""
        self.settle()
        return self.emitted


class StageEngine(Engine):
    """The engine of one micro-batch on one stage; all stages must submit the same requests and step alike."""

    def __init__(self, stage: InferenceStage, max_rows: int, pool: PagePool) -> None:
        super().__init__(stage, max_rows, pool=pool, read_late=True)
        self.stage = stage
        self.advance = self._advance
        self.decode_one = lambda _, state, pages: self._advance(state, step_logits(stage, state, pages))
        self._drawn: Drawn | None = None  # the latest

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int | None]]:
        """See `Engine.step`."""
        results = super().step()
        if self.is_idle:
            self._settle()  # nothing may arrive after the end
        return results

    def _settle(self) -> None:
        if self._drawn is not None:
            self._drawn.settle()

    def _decode(self) -> None:
        self._settle()
        super()._decode()

    def _fitting_state(self, joining: Sequence) -> DecodeState:
        self._settle()
        return super()._fitting_state(joining)

    def _advance(self, state: DecodeState, logits: Tensor, drawing: Tensor | None = None) -> None:
        stage, work = self.stage, None
        if stage.is_last:
            tokens, _ = draw(state, logits)
            for other in range(stage.num_stages - 1):
                stage.send(tokens, other)
        else:
            tokens = torch.empty_like(state.tokens)
            work = dist.irecv(tokens, group=stage.group, group_src=stage.num_stages - 1)
        self._drawn = Drawn(state, tokens, work, drawing)
        if stage.is_last:
            self._drawn.settle()

    def _readout(self, state: DecodeState) -> Emitted:
        assert self._drawn is not None and self._drawn.state is state
        return self._drawn


def generate_in_pipeline(
    stage: InferenceStage,
    requests: Iterable[Request],
    num_micro_batches: int = 1,
    max_rows: int = 64,
    memory: int | None = None,
) -> list[list[int]]:
    """The answer to each request, in their order, on all ranks; every rank must call it with the same requests.

    Args:
        num_micro_batches: that take turns, in the passes over prompts and in decoding; a pipeline without idle stages
            needs as many as stages.
        max_rows: most requests that decode at a time, over all micro-batches.
        memory: bytes of each rank for keys and values, as in `Engine`.

    Raises:
        UserError: no micro-batches, more of them than rows, or a request that the engine refuses or that asks for
            log-probabilities, which only the last stage has.
    """
    if not 1 <= num_micro_batches <= max_rows:
        raise UserError(f"num_micro_batches is {num_micro_batches}; it must be 1 to max_rows, {max_rows}")
    pool, asked = PagePool(stage, memory, stage.page_layers), list(requests)
    rows = -(-max_rows // num_micro_batches)
    engines = [StageEngine(stage, rows, pool) for _ in range(num_micro_batches)]
    for index, request in enumerate(asked):
        if request.logprobs:
            raise UserError(
                f"prompt {index} asks for logprobs, which a pipeline does not report: load the model with pp 1"
            )
        engines[0].check(request, f"prompt {index}")
    answers: list[list[int]] = [[] for _ in asked]
    numbers: list[dict[int, int]] = [{} for _ in engines]  # of each engine: its number of a request -> the index
    for index, request in enumerate(asked):
        part = index % num_micro_batches
        numbers[part][engines[part].submit(request)] = index
    while not all(engine.is_idle for engine in engines):
        for engine, own in zip(engines, numbers, strict=True):
            if not engine.is_idle:
                for number, token in engine.step():
                    if token is not None:
                        answers[own[number]].append(token)
    stage.finish_sending()
    return answers
