"""Passes over prompts, in chunks: each writes its tokens' keys and values into pages and reads those before them.

A chunk may end anywhere, also within a run of pictures or within a sound: which pictures a token sees, and which row of
the audio embeddings stands at it, is known for the whole prompt beforehand.
Shapes: R rows of a pass, T tokens of the longest chunk, S places of a table, L LM layers, K blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.attention import DecodeStep
from mm.inference.paged import PagedCache, PagedMask, VisionTable
from mm.inference.pages import SINK, TEXT, ZEROS, PagePool
from mm.inference.rows import PromptRow
from mm.model import MultimodalModel


def run_chunks(
    model: MultimodalModel, pool: PagePool, rows: Sequence[PromptRow], counts: Sequence[int], width: int | None = None
) -> Tensor:
    """Run the next `counts` tokens of each row through the model.

    Args:
        width: T, where it is fixed; the rest is padding.

    Returns:
        the normalised hidden states of each row's last token, [R, D].
    """
    device, size = pool.device, pool.unit_tokens[TEXT]
    width = max(counts) if width is None else width
    num_pages = max(pool.pages_of(TEXT, row.done + count) for row, count in zip(rows, counts, strict=True))
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    table = torch.full((pool.layers[TEXT], len(rows), num_pages), ZEROS)
    places = torch.full((pool.layers[TEXT], len(rows), width), SINK * size)
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        tokens[index, :count] = torch.tensor(row.prompt.sample.tokens[row.done : row.done + count])
        units = torch.tensor([page.units for page in row.text]).t()[:, : pool.pages_of(TEXT, row.done + count)]
        table[:, index, : units.shape[1]] = units
        positions = torch.arange(row.done, row.done + count)
        places[:, index, :count] = units[:, positions // size] * size + positions % size
    tokens_there = tokens.to(device, non_blocking=True)
    vision = {
        kind: seen for kind in pool.layers if kind != TEXT and (seen := _vision_table(pool, rows, counts, width, kind))
    }
    cache = PagedCache(
        model, pool, table.to(device, non_blocking=True), places.flatten(1).to(device, non_blocking=True), vision
    )
    starts = torch.tensor([row.done for row in rows])
    step, positions = None, torch.arange(width)  # whole prompts: causal attention among the tokens of the pass
    if starts.any():
        positions = starts[:, None] + positions
        mask = torch.arange(num_pages * size) <= positions[..., None]
        step = DecodeStep(0, num_pages * size, mask[:, None].to(device, non_blocking=True))
    x = _insert_audio(model, model.embed(tokens_there), tokens_there, rows, counts)
    x = model.run_layers(x, positions.to(device, non_blocking=True), cache.contexts, cache, step)
    last = torch.tensor(list(counts)).to(device, non_blocking=True) - 1
    return model.language_model.model.norm(x[torch.arange(len(rows), device=device), last])


def _vision_table(
    pool: PagePool, rows: Sequence[PromptRow], counts: Sequence[int], width: int, kind: str
) -> VisionTable | None:
    """What the rows' next tokens see of one modality; None if nothing."""
    ranges = [
        row.prompt.seen_items(kind, row.done, row.done + count) if kind in row.items else (0, 0)
        for row, count in zip(rows, counts, strict=True)
    ]
    if not any(last > first for first, last in ranges):
        return None
    own = [row.read_by(pool, row.done, row.done + count) for row, count in zip(rows, counts, strict=True)]
    num_pages = max(pages.vision[kind].shape[1] for pages in own if kind in pages.vision)
    size = pool.unit_tokens[kind]
    table = torch.full((pool.layers[kind], len(rows), num_pages), ZEROS)
    mask = torch.ones(len(rows), 1, width, num_pages * size, dtype=torch.bool)
    attending = torch.zeros(len(rows), width, 1, dtype=torch.bool)
    for index, (row, count, (first, last)) in enumerate(zip(rows, counts, ranges, strict=True)):
        if last == first:
            continue
        units = own[index].vision[kind]
        table[:, index, : units.shape[1]] = units
        items = row.prompt.items[kind][first:last]
        spans = [torch.full((pool.pages_of(kind, item.num_tokens) * size,), -1) for item in items]
        for number, (item, span) in enumerate(zip(items, spans, strict=True), first):
            span[: item.num_tokens] = number
        item_of = torch.full((num_pages * size,), -1)
        item_of[: units.shape[1] * size] = torch.cat(spans)
        start, end = row.prompt.visible[kind][row.done : row.done + count].unbind(1)
        sees = (item_of >= start[:, None]) & (item_of < end[:, None]) & (item_of >= 0)
        attending[index, :count, 0] = end > start
        mask[index, 0, :count] = sees | (end <= start)[:, None]
    there = (one.to(pool.device, non_blocking=True) for one in (mask, attending))
    return VisionTable(table.to(pool.device, non_blocking=True), PagedMask(*there))


def _insert_audio(
    model: MultimodalModel, x: Tensor, tokens: Tensor, rows: Sequence[PromptRow], counts: Sequence[int]
) -> Tensor:
    """Embedded tokens [R, T, D], with sounds and the marks around them in the rows that hold sounds."""
    hearing = [index for index, row in enumerate(rows) if row.prompt.sample.speech]
    if not hearing:
        return x
    places: list[tuple[int, int]] = []
    parts = [x.new_zeros(0, x.shape[-1])]
    for index in hearing:
        row = rows[index]
        columns = [n for n in range(counts[index]) if row.prompt.audio_rows[row.done + n] >= 0]
        if columns:
            assert row.audio is not None
            chosen = torch.tensor([row.prompt.audio_rows[row.done + n] for n in columns])
            parts.append(row.audio[chosen.to(x.device, non_blocking=True)])
            places += [(index, column) for column in columns]
    marked = torch.full_like(tokens, -1)
    marked[hearing] = tokens[hearing]
    at = torch.tensor(places, dtype=torch.long).view(-1, 2).unbind(1)
    return model.place_audio(x, marked, torch.cat(parts), at)
