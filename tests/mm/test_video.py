"""The video adapter with open gates: which tokens clips act on, how times of frames matter, and what stays unchanged.

Tolerances as in test_model.py.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mm
from mm.batch import blank_pixels
from mm.evaluation.baselines import keep_middle_frame, shuffle_frames
from mm.video_adapter import VideoAdapterConfig
from video.aggregator import AggregatorConfig, TemporalAggregator, split_into_passes, time_embedding
from video.sampling import Clip

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
SMALL = AggregatorConfig(
    factor=4, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_time_frequencies=16
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def config(tiny_config) -> mm.ModelConfig:
    return replace(tiny_config, video_adapter=VideoAdapterConfig(aggregator=SMALL, interval=2))


@pytest.fixture(scope="module")
def model(beside_tiny_model, config) -> mm.MultimodalModel:
    """A video adapter with open gates beside the parts of the tiny model."""
    return beside_tiny_model(config, seed=1)


@pytest.fixture(scope="module")
def make_clip(random_tiles) -> Callable[..., Clip]:
    """make_clip(num_frames, seed=0, grid=(1, 1)) -> noise at 5 Hz."""

    def clip(num_frames: int, seed: int = 0, grid: tuple[int, int] = (1, 1)) -> Clip:
        frames = [random_tiles(1000 * seed + index, grid) for index in range(num_frames)]
        return Clip(frames, torch.arange(num_frames, dtype=torch.float64) / 5 + 0.1)

    return clip


@pytest.fixture(scope="module")
def sample(make_sample, make_clip, config) -> Callable[..., mm.Sample]:
    """sample("..v.i", frames=(5,), seed=0): `v` is a clip of so many frames, `i` an image, `.` a text token."""

    def make(pattern: str, frames: tuple[int, ...] = (5,), seed: int = 0) -> mm.Sample:
        made = make_sample(pattern, seed)
        made.tokens = [
            config.video_token_id if mark == "v" else token for mark, token in zip(pattern, made.tokens, strict=True)
        ]
        made.videos = [
            make_clip(frames[n % len(frames)], seed + n, ((1, 1), (1, 2))[n % 2]) for n in range(pattern.count("v"))
        ]
        return made

    return make


def logits(model: mm.MultimodalModel, *samples: mm.Sample) -> torch.Tensor:
    return model(mm.collate(samples))


def with_clip(sample: mm.Sample, clip: Clip) -> mm.Sample:
    return replace(sample, videos=[clip])


def test_gates_of_zero_change_no_row(beside_tiny_model, config, tiny_model, sample, make_sample):
    fresh = beside_tiny_model(config, seed=1)
    for block in fresh.video_adapter.blocks:
        block.gate_attn.data.zero_()
        block.gate_ffn.data.zero_()
    others = [make_sample("..i..", 1), make_sample(".....", 2)]
    assert torch.equal(logits(fresh, *others), logits(tiny_model, *others))
    seeing, blind = sample("i.v.."), sample("i.v..")
    blind.videos = []
    assert torch.equal(logits(fresh, seeing), logits(tiny_model, blind))


def test_open_gates_change_only_rows_with_clips(model, tiny_model, sample, make_sample):
    rows = [make_sample("..i..", 1), sample("..v..", seed=5), make_sample(".....", 2)]
    without = [rows[0], make_sample(".....", 3), rows[2]]
    with_video, plain = logits(model, *rows), logits(tiny_model, *without)
    assert torch.equal(with_video[[0, 2]], plain[[0, 2]])
    closed = replace(rows[1], videos=[])
    assert (with_video[1] - logits(tiny_model, closed)[0]).abs()[2:].max() > 0.01


def test_clips_do_not_act_on_earlier_tokens(model, sample, make_clip):
    first = sample("..v..", (5,))
    second = with_clip(first, make_clip(5, seed=9))
    a, b = logits(model, first)[0], logits(model, second)[0]
    assert torch.equal(a[:2], b[:2])
    assert ((a - b).abs().amax(-1)[2:] > 1e-3).all()


def test_images_and_clips_are_attended_to_by_their_own_blocks(model, sample, make_clip):
    mixed = sample("i.v..", (3,))
    contexts = model.vision_contexts(mm.collate([mixed]), None)
    assert set(contexts) == {"image", "video"}
    assert contexts["image"].tokens.shape[0] == model.vision_encoder.num_vision_tokens(mixed.images[0])
    assert contexts["video"].tokens.shape[0] == model.vision_encoder.num_vision_tokens(mixed.videos[0].frames[0])
    for (_, kind), block in model.blocks().items():
        assert block in (model.image_adapter if kind == "image" else model.video_adapter).blocks


def test_a_batch_gives_each_row_what_it_gets_alone(model, sample, make_sample):
    rows = [sample("..v..v..", (5, 9)), make_sample(".i.", 1), sample("v", (1,), 3), sample(".i.v.", (64,), 4)]
    together = logits(model, *rows)
    for index, row in enumerate(rows):
        assert torch.allclose(together[index, : len(row.tokens)], logits(model, row)[0], **CLOSE)


def test_cached_decoding_equals_the_whole_pass(model, sample, decoding_logits):
    rows = [sample("..v..i", (5,)), sample("i..v", (6,), 2)]
    generator = torch.Generator().manual_seed(0)
    new = torch.randint(3, 300, (2, 4), generator=generator).tolist()
    found = decoding_logits(model, rows, new)
    for count, step in enumerate(found):
        longer = [replace(row, tokens=row.tokens + added[:count]) for row, added in zip(rows, new, strict=True)]
        for row, one in enumerate(longer):
            assert torch.allclose(step[row], logits(model, one)[0, -1], **CLOSE)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8, 9, 63, 64])
def test_frames_are_merged_in_groups_for_any_number_of_frames(model, make_clip, num_frames):
    clip = make_clip(num_frames)
    tokens = model.video_adapter([clip], model.vision_encoder)
    per_frame = model.vision_encoder.num_vision_tokens(clip.frames[0])
    groups = -(-num_frames // SMALL.factor)
    assert tokens.shape == (groups * per_frame, model.config.language_model.hidden_size)
    last = (groups - 1) * SMALL.factor  # a ragged last group is what its frames are alone
    alone = model.video_adapter([Clip(clip.frames[last:], clip.times[last:])], model.vision_encoder)
    assert torch.allclose(tokens[-per_frame:], alone, **CLOSE)


def test_frames_per_pass_limits_memory_and_does_not_change_results(model, make_clip):
    adapter, sizes = model.video_adapter, []
    clips = [make_clip(11), make_clip(3, 1, (1, 2)), make_clip(1, 2)]

    def encode(frames):
        sizes.append(len(frames))
        return model.vision_encoder(frames)

    outputs = []
    for num_frames in (1, 2, 3, 5, 100):
        adapter.config = replace(adapter.config, frames_per_pass=num_frames)
        sizes.clear()
        outputs.append(adapter(clips, encode))
        assert max(sizes) <= num_frames
        assert sum(sizes) == 15
    adapter.config = model.config.video_adapter
    for output in outputs[1:]:
        assert torch.allclose(output, outputs[0], **CLOSE)
    assert list(split_into_passes([4, 4, 3, 3, 1], 7)) == [range(0, 1), range(1, 3), range(3, 5)]


def test_the_order_and_times_of_frames_matter(model, make_clip):
    clip = make_clip(4)

    def tokens(frames: list[int], times: torch.Tensor) -> torch.Tensor:
        moved = Clip([clip.frames[i] for i in frames], times)
        return model.video_adapter([moved], model.vision_encoder)

    inorder = tokens([0, 1, 2, 3], clip.times)
    assert (tokens([2, 0, 3, 1], clip.times) - inorder).abs().max() > 0.05  # the order
    assert (tokens([0, 1, 2, 3], 3 * clip.times) - inorder).abs().max() > 0.01  # the speed
    assert (tokens([0, 1, 2, 3], clip.times + 40) - inorder).abs().max() > 0.01  # the start


def test_times_beyond_those_in_training_are_told_apart():
    late = time_embedding(torch.tensor([3000.0, 3000.04, 3600.0], dtype=torch.float64), 32)
    assert torch.cdist(late, late)[~torch.eye(3, dtype=torch.bool)].min() > 0.5


def test_positions_in_the_frame_stay_apart(model, make_clip):
    """Without motion, a latent reads only its own position of the frames, until latents attend to each other."""
    aggregator, times = copy.deepcopy(model.video_adapter.aggregator), make_clip(3).times[None]
    aggregator.motion.weight.zero_()
    features = torch.randn(3, 5, SMALL.hidden_size)
    other = features.clone()
    other[1, 2] += torch.randn(SMALL.hidden_size)
    taken = []
    layer = aggregator.layers[0]
    handle = layer.space_norm.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    for frames in (features, other):
        aggregator._merge(frames[None], times, 5)
    handle.remove()
    difference = (taken[0] - taken[1]).abs().amax(-1)[0]
    assert (difference > 1e-3).tolist() == [False, False, True, False, False]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(outputs) if torch.is_tensor(leaf))])
        return outputs


def test_no_score_matrix_of_all_frames_is_built():
    """64 frames of 4 tiles of 336 px: 2,308 tokens each. Dense scores of one head alone would have 2308 * 32 * 2308."""
    aggregator = TemporalAggregator(replace(SMALL, factor=32, hidden_size=8, intermediate_size=8, num_layers=1), 4, 8)
    tokens, frames = 4 * 577, 64
    with Largest() as largest:
        embedded = aggregator.embed(torch.randn(frames * tokens, 4), [tokens] * frames)
        groups = [torch.stack(embedded[:32]), torch.stack(embedded[32:])]
        merged = aggregator(groups, torch.arange(frames, dtype=torch.float64).split(32), 577)
    assert [one.shape for one in merged] == [(tokens, 8)] * 2
    assert largest.numel <= 64 * tokens * 8 * 2


@pytest.mark.parametrize(("name", "blocks", "total"), [("8b", 2, 0.6e9), ("70b", 5, 4.6e9)])
def test_presets_have_the_published_size(name, blocks, total):
    with torch.device("meta"):
        model = mm.MultimodalModel(mm.preset(name, video=True))
    assert sum(p.numel() for p in model.video_adapter.parameters()) == pytest.approx(total, rel=0.05)
    image, video = model.image_adapter.positions, model.video_adapter.positions
    assert video == image[3::4]
    assert len(video) == blocks


def test_only_the_adapter_gets_gradients_when_only_it_trains(build_model, config, sample):
    with torch.inference_mode(False):
        model = build_model(config).requires_grad_(False)
        model.video_adapter.requires_grad_(True)
        made = sample("v....")
        logits(model, made).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("video_adapter."), name
            if parameter.grad is not None:
                assert parameter.grad.abs().max() > 0, name


def test_wrong_use_is_named(model, tiny_model, sample, make_sample, config):
    with pytest.raises(ValueError, match=r"row 0 has 1 video tokens .* and 0 clips"):
        logits(model, replace(sample("v.."), videos=[]))
    with pytest.raises(ValueError, match=r"row 0 has 0 video tokens .* and 1 clips"):
        logits(model, replace(make_sample("..."), videos=sample("v").videos))
    with pytest.raises(ValueError, match="no video_adapter"):
        logits(tiny_model, sample("v.."))
    with pytest.raises(ValueError, match="interval of at most 3"):
        mm.MultimodalModel(replace(config, video_adapter=VideoAdapterConfig(aggregator=SMALL, interval=4)))
    with pytest.raises(ValueError, match="needs an image_adapter"):
        replace(config, vision_encoder=None, image_adapter=None)


def test_baselines_change_time_alone(sample, make_clip):
    made = sample("i.v..v", (5, 8))
    alone, mixed = keep_middle_frame(made), shuffle_frames(made)
    for clip, single, shuffled in zip(made.videos, alone.videos, mixed.videos, strict=True):
        middle = len(clip.frames) // 2
        assert single.frames[0] is clip.frames[middle] and single.times.tolist() == [clip.times[middle].item()]
        assert len(single.frames) == 1
        assert torch.equal(shuffled.times, clip.times)
        order = [id(frame) for frame in shuffled.frames]
        assert order != [id(frame) for frame in clip.frames] and set(order) == {id(frame) for frame in clip.frames}
    again = shuffle_frames(made).videos[0].frames
    assert [id(frame) for frame in again] == [id(frame) for frame in mixed.videos[0].frames]
    assert alone.images is made.images and alone.tokens is made.tokens
    grey = blank_pixels(made)
    assert all((tiles.pixels == 128).all() for tiles in [*grey.images, *grey.videos[0].frames])
    assert len(grey.videos[1].frames) == 8
