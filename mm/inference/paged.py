"""The model's caches over pages: what `MultimodalModel.run_layers` writes to and reads from.

Shapes: B rows, T tokens of a pass, P units of a row's table, S = P * n its places, L LM layers, K blocks, n tokens of a
unit, G KV heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from layers.attention import KeyValueCache
from mm.cross_attention import VisionCache
from mm.inference.pages import TEXT, PagePool
from mm.model import Cache, MultimodalModel
from mm.vision_context import CrossAttentionMask, VisionContext


class PagedLayer(KeyValueCache):
    """One LM layer's keys and values.

    Args:
        keys, values: of the pool, [U, n, G, head_dim].
        table: int64 [B, P], the units of each row.
        places: int64 [B * T], where in the pool, counted in tokens, the pass's own keys and values go.
    """

    def __init__(self, keys: Tensor, values: Tensor, table: Tensor, places: Tensor) -> None:
        super().__init__(keys, values)
        self.table, self.places = table, places

    def fill(self, k: Tensor, v: Tensor) -> None:
        for pool, new in ((self.keys, k), (self.values, v)):
            pool.view(-1, *pool.shape[2:]).index_copy_(0, self.places, new.transpose(1, 2).flatten(0, 1).to(pool.dtype))

    def append(self, k: Tensor, v: Tensor, positions: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
        self.fill(k, v)
        return _rows(self.keys, self.table).to(k.dtype), _rows(self.values, self.table).to(v.dtype)


class PagedVision(VisionCache):
    """One cross-attention block's keys and values; arguments as of `PagedLayer`."""

    def __init__(self, keys: Tensor, values: Tensor, table: Tensor) -> None:
        super().__init__(keys, values)
        self.table = table

    def read(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return _rows(self.keys, self.table), _rows(self.values, self.table)


class PagedMask(CrossAttentionMask):
    """Which places of its table each token attends to; no shape and no branch depends on the values.

    Args:
        attention_mask: bool [B, 1, T, S], True in whole rows of tokens that attend to nothing.
        attending: bool [B, T, 1].
    """

    def __init__(self, attention_mask: Tensor, attending: Tensor) -> None:
        self.rows, self.packed_positions = None, None
        self.num_rows, self.max_tokens = len(attention_mask), attention_mask.shape[-1]
        self.attention_mask: Tensor = attention_mask
        self.attending: Tensor = attending


@dataclass
class VisionTable:
    """What the rows of a pass see of one modality.

    Attributes:
        table: int64 [K, B, P].
        mask: of P * n places.
    """

    table: Tensor
    mask: PagedMask


class PagedCache(Cache):
    """The caches of one pass.

    Args:
        table: int64 [L, B, P], of the text; a pool may hold units for more layers than the model.
        places: int64 [L, B * T], as of `PagedLayer`.
        vision: by modality; the blocks of the others do not run.
    """

    def __init__(
        self,
        model: MultimodalModel,
        pool: PagePool,
        table: Tensor,
        places: Tensor,
        vision: Mapping[str, VisionTable],
    ) -> None:
        keys_values = pool.keys_values(TEXT)
        self.layers = {
            depth: PagedLayer(*keys_values, *own)
            for depth, *own in zip(model.held_layers(), table, places, strict=False)
        }
        self.vision = {}
        for kind, seen in vision.items():
            depths = [depth for depth, own in model.blocks() if own == kind]
            for depth, own in zip(depths, seen.table, strict=False):
                self.vision[depth, kind] = PagedVision(*pool.keys_values(kind), own)
        self.contexts = {kind: VisionContext(seen.mask) for kind, seen in vision.items()}


def _rows(pool: Tensor, table: Tensor) -> Tensor:
    """The keys or values [B, G, S, head_dim] of a table's rows."""
    rows, width = table.shape
    gathered = pool.index_select(0, table.flatten())  # [B * P, n, G, head_dim]
    return gathered.view(rows, width * pool.shape[1], *pool.shape[2:]).transpose(1, 2)
