"""Paged memory for keys and values: of the text per LM layer, and of pictures and clips per cross-attention block.

All of it lies in one buffer, cut into units of equal bytes. A unit holds the keys and values of a few tokens for one
layer or block. A page is the units of those tokens for all layers (or blocks); the items of the vision cache are pages
of many tokens. A page with a key may serve several requests; one that no request uses stays until its units are needed,
the one unused for longest going first.
Shapes: U units, n tokens of a unit, G KV heads.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.model import MultimodalModel

TEXT = "text"
UNIT_TOKENS = 16  # of the widest dtype in use; a unit holds twice as many tokens of half the width
NUM_RESERVED = 2
ZEROS, SINK = range(NUM_RESERVED)  # a unit that stays 0, which fills tables; one that takes writes of rows without work


@dataclass
class Page:
    """Units that are taken and given back together.

    Attributes:
        units: of a text page one for each LM layer; of a picture or clip, those of its first block, then of the next.
        key: says what the page holds, so that others can find it; None: it belongs to one request alone.
        references: requests that use it.
        filled: whether its keys and values have been computed.
    """

    units: list[int]
    key: bytes | None = None
    references: int = 1
    filled: bool = False


class PagePool:
    """The buffer, and which units are free.

    Args:
        model: gives shapes, device and dtypes.
        memory: bytes of the buffer; None lets it grow with the requests that run at the same time.
        layers: by kind, how many layers or blocks a page holds units for; None: those that the model holds. The stages
            of a pipeline take the largest stage's, so that the same requests fit all of them.

    Raises:
        UserError: a stage of a pipeline without `layers`: it cannot answer alone.

    Attributes:
        found: how many pages `take` found whose content had been computed, by kind.
    """

    def __init__(
        self, model: MultimodalModel, memory: int | None = None, layers: Mapping[str, int] | None = None
    ) -> None:
        config = model.config.language_model
        self.device = model.extra_embeddings.device
        self.heads = (model.num_kv_heads, config.head_dim)
        held = model.held_layers()
        self.dtypes = {TEXT: next(iter(held.values())).input_layernorm.weight.dtype}
        self.layers = Counter({TEXT: len(held)})  # layers or blocks that a page holds units for
        for (_, kind), block in model.blocks().items():
            self.dtypes[kind] = block.cross_attn.k_norm.weight.dtype
            self.layers[kind] += 1
        if layers is not None:
            self.layers = Counter(layers)
        elif len(held) < config.num_layers:
            raise UserError(
                "the model is one stage of a pipeline: generate with mm.parallel.pipelined_inference alone, or load it "
                "with pp 1"
            )
        widest = max(dtype.itemsize for dtype in self.dtypes.values())
        self.unit_tokens = {kind: UNIT_TOKENS * widest // dtype.itemsize for kind, dtype in self.dtypes.items()}
        self.half = UNIT_TOKENS * widest * model.num_kv_heads * config.head_dim  # bytes of a unit's keys
        self.memory, self.found = memory, Counter[str]()
        self._pages: dict[bytes, Page] = {}
        self._idle: OrderedDict[bytes, Page] = OrderedDict()  # pages with a key that no request uses, oldest first
        self._free: list[int] = []
        self._buffer = torch.zeros(2, 0, self.half, dtype=torch.uint8, device=self.device)
        self._num_units = 0
        self._num_idle_units = 0
        if memory is not None:
            self._grow(max(NUM_RESERVED, memory // (2 * self.half)))

    @property
    def capacity(self) -> int:
        """Units that requests may use."""
        return max(0, self._num_units - NUM_RESERVED)

    @property
    def available(self) -> int:
        """Units that can be taken now."""
        return len(self._free) + self._num_idle_units

    def pages_of(self, kind: str, num_tokens: int) -> int:
        """How many units each layer or block needs for some tokens."""
        return -(-num_tokens // self.unit_tokens[kind])

    def units_of(self, kind: str, num_tokens: int) -> int:
        """How many units some tokens of text, or an item, take."""
        return self.pages_of(kind, num_tokens) * self.layers[kind]

    def keys_values(self, kind: str) -> tuple[Tensor, Tensor]:
        """The buffer as keys and as values, each [U, n, G, head_dim]; kinds of one dtype get the same tensors."""
        return self._views[self.dtypes[kind]]

    def reserve(self, num_units: int) -> bool:
        """Whether so many units can be taken.

        A pool without a limit grows until they can, and rather than that pages are lost, as long as those that no
        request uses take no more than those in use.
        """
        if self.memory is None:
            missing = num_units - len(self._free)
            if missing > 0 and self._num_idle_units <= self.capacity - self.available + num_units:
                self._grow(max(2 * self._num_units, self._num_units + missing + NUM_RESERVED))
        return self.available >= num_units

    def take(self, kind: str, key: bytes) -> Page | None:
        """The page of a key, for one more request."""
        page = self._pages.get(key)
        if page is None:
            return None
        if page.references == 0:
            del self._idle[key]
            self._num_idle_units -= len(page.units)
        page.references += 1
        self.found[kind] += page.filled
        return page

    def allocate(self, num_units: int, key: bytes | None = None) -> Page:
        """A new page, to be cleared; `reserve` has said that its units are available."""
        while len(self._free) < num_units:
            oldest, page = self._idle.popitem(last=False)
            del self._pages[oldest]
            self._num_idle_units -= len(page.units)
            self._free += page.units
        units, self._free = self._free[:num_units], self._free[num_units:]
        page = Page(units, key)
        if key is not None:
            self._pages[key] = page
        return page

    def clear(self, pages: Iterable[Page]) -> None:
        """Fill new pages with zeros.

        Nothing of the former content may stay: a row's mask gives other keys the weight 0, and 0 * NaN is NaN.
        """
        units = torch.tensor([unit for page in pages for unit in page.units], dtype=torch.long)
        self._buffer.index_fill_(1, units.to(self.device, non_blocking=True), 0)

    def publish(self, page: Page, key: bytes) -> None:
        """Let others find a page, unless they find another one of the same content already."""
        if page.key is None and key not in self._pages:
            page.key = key
            self._pages[key] = page
        page.filled = True

    def release(self, page: Page) -> None:
        """A request no longer uses a page."""
        page.references -= 1
        if page.references:
            return
        if page.key is None or not page.filled:
            if page.key is not None:
                del self._pages[page.key]
            self._free += page.units
            return
        self._idle[page.key] = page
        self._num_idle_units += len(page.units)

    def _grow(self, num_units: int) -> None:
        first = max(self._num_units, NUM_RESERVED)
        buffer = torch.zeros(2, num_units, self.half, dtype=torch.uint8, device=self.device)
        buffer[:, : self._num_units] = self._buffer
        self._buffer, self._num_units = buffer, num_units
        self._free += range(first, num_units)
        self._views = {
            dtype: tuple(buffer.view(dtype).view(2, num_units, -1, *self.heads)) for dtype in set(self.dtypes.values())
        }
