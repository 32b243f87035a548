"""Attention maps: sums, places on pictures of any shape, and equality with a softmax written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.evaluation.attention_maps import token_attention

SIDE, PATCH = 2, 14  # the tiny encoder's tiles are 28 px: 2 x 2 patches of 14
SIZES = [(28, 28), (50, 20), (20, 90), (56, 40), (100, 28)]  # width, height: several canvases, most with padding


def question(*pictures, text="what shape is it?") -> list[dict]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module", params=["ragged", "llama32"])
def model(request, build_model, tiny_config) -> mm.MultimodalModel:
    encoder = replace(tiny_config.vision_encoder, padding=request.param)
    return build_model(replace(tiny_config, vision_encoder=encoder), seed=5)


@pytest.fixture
def processor(model, tokenizer) -> mm.Processor:
    return mm.Processor(tokenizer, model.config)


@pytest.mark.parametrize("sizes", [*([size] for size in SIZES), SIZES[1:4]])
def test_attention_sums_to_one_over_pictures_summary_tokens_and_padding(model, processor, random_picture, sizes):
    pictures = [random_picture(*size, seed=n) for n, size in enumerate(sizes)]
    maps = mm.attention_maps(model, processor, question(*pictures), "a red circle")
    assert maps.answer == "a red circle" and "".join(maps.tokens) == "a red circle"
    assert maps.positions == [2, 4, 6] and len(maps.pictures) == len(pictures)
    num_answer, total = len(maps.tokens), 0
    for picture in maps.pictures:
        assert picture.patches.shape[:2] == picture.cls.shape[:2] == picture.padding.shape == (3, num_answer)
        total = total + picture.patches.sum((-1, -2)) + picture.cls.sum(-1) + picture.padding
        assert picture.patches.dtype == torch.float32 and (picture.patches > 0).all() and (picture.padding >= 0).all()
        mean = picture.mean_over_answer()
        torch.testing.assert_close(mean.patches[:, 0], picture.patches.mean(1))
        assert mean.cls.shape[1] == mean.padding.shape[1] == 1 and mean.extent == picture.extent
    torch.testing.assert_close(total, torch.ones(3, num_answer), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "grid", "shape", "extent"),
    [
        ((28, 28), (1, 1), (2, 2), (2, 2)),
        ((56, 28), (1, 2), (2, 4), (2, 4)),
        ((28, 84), (3, 1), (6, 2), (6, 2)),
        ((56, 36), (2, 2), (3, 4), (36 / 14, 4)),  # the picture ends within the third row of patches
        ((28, 7), (1, 1), (1, 2), (0.5, 2)),  # the second row of patches is padding
    ],
)
def test_a_map_covers_the_picture_and_not_the_padding(model, processor, random_picture, size, grid, shape, extent):
    picture = random_picture(*size)
    assert processor.prompt(question(picture)).images[0].grid == grid
    (found,) = mm.attention_maps(model, processor, question(picture), "red").pictures
    assert found.patches.shape[2:] == shape and found.extent == extent
    assert found.cls.shape[2] == grid[0] * grid[1]
    covers_all = shape == (grid[0] * SIDE, grid[1] * SIDE)
    assert bool((found.padding > 1e-3).all()) != covers_all


@pytest.mark.parametrize("sizes", [[(84, 28)], [(56, 50)], [(28, 112)], [(56, 28), (40, 56), (28, 28)]])
def test_a_key_that_matches_one_patch_puts_the_maximum_there(model, processor, random_picture, sizes):
    """Vision tokens of zeros but one, which has the key that the first block's queries ask for: for every patch."""
    messages = question(*(random_picture(*size, seed=n) for n, size in enumerate(sizes)))
    sample = processor.example([*messages, {"role": "assistant", "content": "red"}])
    attention = model.blocks()[2, "image"].cross_attn
    before = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    with torch.no_grad():
        model(mm.collate([sample]))
        hook.remove()
        asked = [place - 1 for place, label in enumerate(sample.labels) if label != IGNORED]
        queries = attention.queries(before[0][:, asked])[0].unflatten(0, (2, 2)).mean((1, 2))  # by KV head
        token = torch.linalg.pinv(attention.k_proj.weight) @ queries.flatten()

    counts = [tiles.num_tiles * (1 + SIDE**2) for tiles in sample.images]
    base = 0
    for index, tiles in enumerate(sample.images):
        width, height = sizes[index]
        for y in range(math.ceil(height / PATCH)):
            for x in range(math.ceil(width / PATCH)):
                tile = y // SIDE * tiles.grid[1] + x // SIDE
                vision = torch.zeros(sum(counts), model.config.language_model.hidden_size)
                vision[base + tile * (1 + SIDE**2) + 1 + y % SIDE * SIDE + x % SIDE] = 30 * token
                hook = model.image_adapter.projection.register_forward_hook(lambda *_, vision=vision: vision)
                first = mm.attention_maps(model, processor, messages, "red").pictures[index].mean_over_answer()
                hook.remove()
                place = first.patches[0, 0].argmax().item()
                assert divmod(place, first.patches.shape[-1]) == (y, x)
                assert first.patches[0, 0].max() > 1.5 * first.cls.max()
        base += counts[index]


def test_weights_equal_a_softmax_written_out(model, processor, random_picture):
    """Two pictures, of which the second alone is seen by the answer, with keys and queries caught on their way."""
    first, second = random_picture(56, 28), random_picture(28, 28, seed=1)
    messages = [*question(first), {"role": "assistant", "content": "a circle"}, *question(second)]
    sample = processor.example([*messages, {"role": "assistant", "content": "blue"}])
    caught = {}
    hooks = [
        block.cross_attn.register_forward_pre_hook(lambda module, inputs, depth=depth: caught.update({depth: inputs}))
        for (depth, _), block in model.blocks().items()
    ]
    with torch.no_grad():
        model(mm.collate([sample]))
    for hook in hooks:
        hook.remove()
    maps = mm.attention_maps(model, processor, messages, "blue")
    end = len(sample.tokens) - 1  # before the stop token
    for layer, (depth, (x, k, _, _)) in enumerate(sorted(caught.items())):
        attention = model.blocks()[depth, "image"].cross_attn
        for token in range(len(maps.tokens)):
            state = x[0, end - len(maps.tokens) + token - 1]
            heads = attention.q_proj(state).view(4, -1)
            weights = np.zeros(15)
            for head in range(4):
                q, keys = attention.q_norm(heads[head]).tolist(), k[0, head // 2].tolist()
                scores = [sum(a * b for a, b in zip(q, key, strict=True)) / len(q) ** 0.5 for key in keys]
                exponents = [0.0] * 10 + [math.exp(score) for score in scores[10:]]
                weights += np.array(exponents) / sum(exponents) / 4
            found = maps.pictures[1]
            assert found.cls[layer, token, 0].item() == pytest.approx(weights[10], abs=1e-6)
            np.testing.assert_allclose(found.patches[layer, token].flatten(), weights[11:], atol=1e-6)
    assert not maps.pictures[0].patches.any() and not maps.pictures[0].cls.any()  # an earlier turn's picture


def test_the_models_own_answer_and_the_same_answer_given_have_equal_maps(model, processor, random_picture):
    messages = question(random_picture(56, 40))
    own = mm.attention_maps(model, processor, messages, max_new_tokens=4)
    tokens = mm.generate_tokens(model, [processor.prompt(messages)], 4)[0]
    assert own.answer == processor.decode(tokens) and len(own.tokens) == len(tokens) > 0
    sample = processor.prompt(messages)
    whole = replace(sample, tokens=sample.tokens + tokens)
    start = len(sample.tokens) - 1
    alone = token_attention(model, whole, range(start, start + len(tokens)))
    found = own.pictures[0]
    for layer, depth in enumerate(own.positions):
        seen = found.patches[layer].sum((-1, -2)) + found.padding[layer]
        cls = alone[depth].unflatten(-1, (4, 5))[..., 0]
        torch.testing.assert_close(found.cls[layer], cls, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen, alone[depth].sum(-1) - cls.sum(-1), rtol=0, atol=1e-5)


def test_any_source_of_a_picture_gives_the_same_maps(model, processor, random_picture, tmp_path):
    picture = random_picture(56, 40)
    picture.save(tmp_path / "picture.png")
    path, data = tmp_path / "picture.png", (tmp_path / "picture.png").read_bytes()
    with path.open("rb") as opened:
        found = [
            mm.attention_maps(model, processor, question(source), "red") for source in (picture, path, data, opened)
        ]
    for maps in found[1:]:
        assert torch.equal(maps.pictures[0].patches, found[0].pictures[0].patches)


def test_what_has_no_map_is_refused(model, processor, random_picture, monkeypatch):
    with pytest.raises(ValueError, match="no picture to attend to"):
        mm.attention_maps(model, processor, [{"role": "user", "content": "what is it?"}], "red")
    with pytest.raises(ValueError, match="message 1 \\(assistant\\) is empty"):
        mm.attention_maps(model, processor, question(random_picture()), "")
    monkeypatch.setattr(mm.evaluation.attention_maps, "generate_tokens", lambda *_: [[]])
    with pytest.raises(ValueError, match="answer is empty"):
        mm.attention_maps(model, processor, question(random_picture()))
