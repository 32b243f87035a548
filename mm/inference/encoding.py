"""Encoding what prompts hold besides text: pictures and clips into pages, sounds into rows of the model's input.

Shapes: K blocks, N vision tokens, D width of the language model.
"""

from collections.abc import Sequence

import torch

from mm.inference.answer import Answer
from mm.inference.joint_ctc import CtcBias
from mm.inference.pages import Page, PagePool
from mm.inference.prompt import Item
from mm.model import MultimodalModel
from speech.adapter import num_tokens


def encode_items(model: MultimodalModel, pool: PagePool, items: Sequence[tuple[str, Item, Page]]) -> None:
    """Encode pictures and clips, those of a modality together, and write each block's keys and values."""
    device = pool.device
    for kind, encode in (("image", model.encode_images), ("video", model.encode_videos)):
        chosen = list({id(page): (item, page) for own, item, page in items if own == kind}.values())
        if not chosen:
            continue
        vision = encode([item.value.to(device) for item, _ in chosen])
        size, places = pool.unit_tokens[kind], []
        for item, page in chosen:
            units = torch.tensor(page.units).view(pool.layers[kind], -1)
            places.append((units[..., None] * size + torch.arange(size)).flatten(1)[:, : item.num_tokens])
        into = torch.cat(places, dim=1).to(device, non_blocking=True)  # [K, N]
        blocks = [block for (_, own), block in model.blocks().items() if own == kind]
        for block, own in zip(blocks, into, strict=False):
            for target, new in zip(pool.keys_values(kind), block.cross_attn.keys_values(vision), strict=True):
                target.view(-1, *target.shape[2:]).index_copy_(0, own, new.to(target.dtype))
        for _, page in chosen:
            page.filled = True


def encode_sounds(model: MultimodalModel, answers: Sequence[Answer]) -> None:
    """Encode the sounds of prompts together, and start CTC's part of transcripts."""
    if not answers:
        return
    speech = [answer.prompt_row.prompt.sample.speech for answer in answers]
    sounds = [mel.to(model.extra_embeddings.device) for own in speech for mel in own]
    lengths = [sum(num_tokens(len(mel)) for mel in own) for own in speech]
    encoded = model.encode_audio(sounds)
    for answer, audio in zip(answers, model.audio_inputs(encoded, sounds).split(lengths), strict=True):
        answer.prompt_row.audio = audio
    pairs = zip(answers, encoded.split(lengths), strict=True)
    joint = [(answer, audio) for answer, audio in pairs if answer.request.joint_ctc]
    if joint:
        candidates, log_probs = model.audio_token_scores(torch.cat([audio for _, audio in joint]))
        counts = [len(audio) for _, audio in joint]
        for (answer, _), *scores in zip(joint, candidates.split(counts), log_probs.split(counts), strict=True):
            answer.ctc = CtcBias(scores[0], scores[1], answer.request.stop_tokens or ())
