"""Which shapes the state takes: as small as its rows allow, from few sizes that each need one compilation, or one."""

from dataclasses import replace

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.inference.pages import TEXT, PagePool
from mm.inference.prompt import Prompt
from mm.inference.request import Request
from mm.inference.state import Bucket, RowPages

MAX_TILES = 4  # that a row of the only shape sees, unless more are asked for
MIN_PAGES = 4  # the smallest width of a text table in compiled steps


class Shapes:
    """Buckets of a pool's states.

    Args:
        config: of the model.
        rounds: sizes are powers of two, and a state does not shrink before it is empty.
        fixed_rows: rows of the only shape, for an engine whose numbers may not depend on the others; None: as needed.
        vision_tokens: with `fixed_rows`, the most that a row sees of each modality; None: those of `MAX_TILES` tiles.
    """

    def __init__(
        self, pool: PagePool, config: ModelConfig, rounds: bool, fixed_rows: int | None, vision_tokens: int | None
    ) -> None:
        self.pool, self.rounds, self.fixed_rows = pool, rounds, fixed_rows
        self.max_pages = pool.pages_of(TEXT, config.language_model.context)
        tokens_per_tile = 0 if config.vision_encoder is None else config.vision_encoder.tokens_per_tile
        self.vision_tokens = MAX_TILES * tokens_per_tile if vision_tokens is None else vision_tokens

    def check(self, prompt: Prompt, name: str) -> None:
        """Check that the only shape holds what an answer sees. Args: name: of the prompt, for messages.

        Raises:
            UserError: it does not.
        """
        for kind, items in prompt.items.items():
            first, last = prompt.seen_items(kind, prompt.length - 1, prompt.length)
            sizes = [item.num_tokens for item in items[first:last]]
            if sum(self.pool.pages_of(kind, size) for size in sizes) > self.pool.pages_of(kind, self.vision_tokens):
                raise UserError(
                    f"the answer to {name} sees {sum(sizes)} vision tokens of {kind} parts, and vision_tokens is "
                    f"{self.vision_tokens}: give the engine more"
                )

    def pages(self, num_tokens: int) -> int:
        """Width of the part of a text table that holds some tokens."""
        return self._page_bucket(self.pool.pages_of(TEXT, num_tokens))

    def bucket(self, rows: dict[int, tuple[Request, RowPages]], current: Bucket | None) -> Bucket:
        """The bucket of the rows that decode, by row.

        Args:
            current: of the state that holds some of them already.
        """
        requests = [request for request, _ in rows.values()]
        vision: dict[str, int] = {}
        for _, pages in rows.values():
            for kind, units in pages.vision.items():
                vision[kind] = max(vision.get(kind, 0), units.shape[1])
        needed = Bucket(
            rows=self._rounded(max(rows) + 1),
            pages=self._page_bucket(max(pages.text.shape[1] for _, pages in rows.values())),
            num_stops=self._rounded(max(1, *(len(request.stop_tokens or ()) for request in requests))),
            vision=tuple(sorted((kind, self._rounded(width)) for kind, width in vision.items())),
            samples=any(request.temperature > 0 for request in requests),
            cuts=any(request.temperature > 0 and request.top_p < 1 for request in requests),
            joint=any(request.joint_ctc for request in requests),
            masked=any(request.mask is not None for request in requests),
            logprobs=any(request.logprobs for request in requests),
        )
        if self.fixed_rows is not None:
            kinds = sorted(kind for kind in self.pool.layers if kind != TEXT)
            widths = tuple((kind, self.pool.pages_of(kind, self.vision_tokens)) for kind in kinds)
            return replace(needed, rows=self.fixed_rows, pages=self.max_pages, vision=widths)
        return needed.joined(current) if self.rounds and current is not None else needed

    def _page_bucket(self, num_pages: int) -> int:
        if self.fixed_rows is not None:
            return self.max_pages
        return min(max(MIN_PAGES, self._rounded(num_pages)), self.max_pages) if self.rounds else num_pages

    def _rounded(self, number: int) -> int:
        return power_of_two(number) if self.rounds else number


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least` and 1."""
    return 1 << max(0, least - 1).bit_length()
