"""The pages of one row: taken when a request is admitted, shared where others have them, given back at its end.

A row takes what its prompt and its longest answer need at once, so that no row has to give way to another later.
"""

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.inference.pages import TEXT, Page, PagePool
from mm.inference.prompt import Item, Prompt
from mm.inference.state import RowPages


@dataclass
class PromptRow:
    """A prompt on its way through the model, and then its answer.

    Attributes:
        text: pages for prompt and answer, in order.
        items: the pages of its pictures and clips, by modality; None for those that no further token sees.
        done: tokens of the prompt whose keys and values are in the pages.
        audio: what stands at its audio tokens, packed [N, D], once it has been encoded.
    """

    prompt: Prompt
    text: list[Page]
    items: dict[str, list[Page | None]]
    done: int = 0
    audio: Tensor | None = field(default=None, repr=False)

    def missing_items(self, count: int) -> list[tuple[str, Item, Page]]:
        """Pictures and clips that the next `count` tokens see and that have not been encoded."""
        missing = []
        for kind, pages in self.items.items():
            first, last = self.prompt.seen_items(kind, self.done, self.done + count)
            for item, page in zip(self.prompt.items[kind][first:last], pages[first:last], strict=True):
                assert page is not None
                if not page.filled:
                    missing.append((kind, item, page))
        return missing

    def needs_audio(self, count: int) -> bool:
        """Whether the sounds have yet to be encoded for the next `count` tokens."""
        rows = self.prompt.audio_rows[self.done : self.done + count]
        return self.audio is None and any(row >= 0 for row in rows)

    def read_by(self, pool: PagePool, start: int, end: int) -> RowPages:
        """The units that the tokens of [start, end) read: all of the text, and the items that they see."""
        vision, is_real = {}, {}
        for kind, pages in self.items.items():
            first, last = self.prompt.seen_items(kind, start, end)
            seen = [page for page in pages[first:last] if page is not None]
            if seen:
                sizes = [item.num_tokens for item in self.prompt.items[kind][first:last]]
                layers, size = pool.layers[kind], pool.unit_tokens[kind]
                by_block = [torch.tensor(page.units).view(layers, -1) for page in seen]
                vision[kind] = torch.cat(by_block, dim=1)
                is_real[kind] = torch.cat(
                    [torch.arange(units.shape[1] * size) < real for units, real in zip(by_block, sizes, strict=True)]
                )
        return RowPages(torch.tensor([page.units for page in self.text]).t(), vision, is_real)

    def publish(self, pool: PagePool) -> None:
        """Let other requests find the full pages of the prompt, as far as it has passed."""
        full = self.done // pool.unit_tokens[TEXT]
        for page, key in zip(self.text[:full], self.prompt.page_keys, strict=False):
            pool.publish(page, key)

    def release_unseen(self, pool: PagePool) -> None:
        """Give back the pictures and clips that the answer does not see."""
        for kind, pages in self.items.items():
            first, last = self.prompt.seen_items(kind, self.prompt.length - 1, self.prompt.length)
            for index, page in enumerate(pages):
                if page is not None and not first <= index < last:
                    pool.release(page)
                    pages[index] = None

    def release(self, pool: PagePool) -> None:
        """Give all pages back, the last of the text first: what a chain of keys begins with stays longest."""
        for page in chain(reversed(self.text), *self.items.values()):
            if page is not None:
                pool.release(page)
        self.text, self.items = [], {}


def check_memory(pool: PagePool, num_tokens: int, vision_sizes: dict[str, list[int]], name: str) -> None:
    """Check that a request fits a pool that is empty.

    Args:
        num_tokens: of prompt and answer.
        vision_sizes: vision tokens of each picture and clip, by modality.
        name: of the prompt, for messages.

    Raises:
        UserError: it does not.
    """
    needed = pool.units_of(TEXT, num_tokens)
    needed += sum(pool.units_of(kind, size) for kind, sizes in vision_sizes.items() for size in sizes)
    if needed > pool.capacity:
        unit = 2 * pool.half
        raise UserError(
            f"{name} and its answer take {needed * unit} bytes of keys and values, and the memory of {pool.memory} "
            f"bytes holds {pool.capacity * unit}: shorten it, or give more memory"
        )


def allocate(pool: PagePool, prompt: Prompt, answer: int, reuses: int | None = None) -> PromptRow | None:
    """A row with the pages of a prompt and its answer; None if they are not free.

    The last token is computed even where all pages of a prompt are found, since its logits are needed.

    Args:
        answer: most tokens of the answer.
        reuses: found text ends at a multiple of so many tokens; None: at any page.
    """
    size, layers = pool.unit_tokens[TEXT], pool.layers[TEXT]
    step = max(1, (reuses or size) // size)
    found: list[Page] = []
    for key in prompt.page_keys[: (prompt.length - 1) // size]:
        page = pool.take(TEXT, key)
        if page is None:
            break
        found.append(page)
    while len(found) % step:
        pool.release(found.pop())
    row = PromptRow(prompt, found, {kind: [None] * len(own) for kind, own in prompt.items.items()}, len(found) * size)
    needed: dict[bytes, int] = {}  # units of the items that nobody has
    for kind, items in prompt.items.items():
        for index in range(*prompt.seen_items(kind, row.done, prompt.length)):
            row.items[kind][index] = pool.take(kind, items[index].key)
            if row.items[kind][index] is None:
                needed[items[index].key] = pool.units_of(kind, items[index].num_tokens)
    fresh = pool.pages_of(TEXT, prompt.length + answer) - len(found)
    if not pool.reserve(fresh * layers + sum(needed.values())):
        row.release(pool)
        return None
    new = [pool.allocate(layers) for _ in range(fresh)]
    row.text += new
    for kind, items in prompt.items.items():
        for index in range(*prompt.seen_items(kind, row.done, prompt.length)):
            key = items[index].key
            if key in needed:
                new.append(pool.allocate(needed.pop(key), key))
                row.items[kind][index] = new[-1]
            elif row.items[kind][index] is None:  # of a picture that stands twice, the second finds the first's
                row.items[kind][index] = pool.take(kind, key)
    pool.clear(new)
    return row


def allocate_follower(pool: PagePool, prompt: Prompt, answer: int) -> PromptRow | None:
    """A row for another answer to a prompt that is passing: the pages that `follow` does not take from there."""
    size, layers = pool.unit_tokens[TEXT], pool.layers[TEXT]
    own = pool.pages_of(TEXT, prompt.length + answer) - prompt.length // size
    if not pool.reserve(own * layers):
        return None
    row = PromptRow(prompt, [pool.allocate(layers) for _ in range(own)], {})
    pool.clear(row.text)
    return row


def follow(pool: PagePool, row: PromptRow, leader: PromptRow) -> None:
    """Share the full pages of a prompt that has passed in another row, and copy the last one."""
    size = pool.unit_tokens[TEXT]
    full = row.prompt.length // size
    if row.prompt.length % size:
        into, source = (torch.tensor(page.units, device=pool.device) for page in (row.text[0], leader.text[full]))
        for target in pool.keys_values(TEXT):
            target[into] = target[source]
    row.text = [*leader.text[:full], *row.text]
    row.items = {kind: list(pages) for kind, pages in leader.items.items()}
    for page in chain(leader.text[:full], *row.items.values()):
        if page is not None:
            page.references += 1
    row.done = row.prompt.length
