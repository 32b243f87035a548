"""What many tests share: a tiny random model whose every gate and table is open, its tokenizer, pictures."""

import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import mm
from app.cli import main
from layers.rotary import RotaryConfig
from mm.cross_attention import ImageAdapterConfig
from mm.encoder_folders import save_vision_encoder
from mm.language_model import LanguageModelConfig
from mm.video_adapter import VideoAdapterConfig
from shards.format import Record
from shards.writer import write_shards
from speech.adapter import SpeechAdapterConfig
from speech.conformer import SpeechEncoderConfig
from video.aggregator import AggregatorConfig
from vision.encoder import VisionEncoderConfig
from vision.tiling import Tiles

# Tiny tensors: threads cost more than they bring, also in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Tests marked `fuzz`: the same few inputs in each `make test`, and CASES new ones in `make fuzz`.
CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
settings.register_profile(
    "test", max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS
)
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("CASES", "1")),
    deadline=None,
    print_blob=True,
    suppress_health_check=CHECKS,
)
settings.load_profile("fuzz" if "CASES" in os.environ else "test")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = [
    "what shape is in the picture? a red circle, a blue square or a green triangle",
    "is there a circle? yes. no. user assistant system describe the picture",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two processes then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges, so that characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|start|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def tiny_config(tokenizer: PreTrainedTokenizerFast) -> mm.ModelConfig:
    language_model = LanguageModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        rotary=RotaryConfig(theta=10_000.0),
        context=160,
        stop_tokens=(tokenizer.eos_token_id,),
    )
    encoder = VisionEncoderConfig(
        tile_size=28,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_gated_layers=1,
        num_heads=2,
        tap_points=(0, 1),
    )
    return mm.ModelConfig(language_model, encoder, ImageAdapterConfig(positions=(2, 4, 6)))


@pytest.fixture(scope="session")
def build_model() -> Callable[..., mm.MultimodalModel]:
    """build_model(config, seed=0) -> a random model in which every gate is open and every table is filled."""

    def build(config: mm.ModelConfig, seed: int = 0) -> mm.MultimodalModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mm.MultimodalModel(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    leaf = name.rpartition(".")[2]
                    if leaf in ("gate", "gate_attn", "gate_ffn"):
                        parameter.uniform_(0.6, 1.2)
                    elif leaf in ("tile", "embedding", "extra_embeddings"):
                        parameter.normal_()
                    elif "norm" in name and leaf == "weight":
                        parameter.uniform_(0.7, 1.3)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_model(build_model, tiny_config) -> mm.MultimodalModel:
    """Shared by all tests: not to be changed."""
    return build_model(tiny_config)


@pytest.fixture(scope="session")
def beside_tiny_model(build_model, tiny_model) -> Callable[..., mm.MultimodalModel]:
    """beside_tiny_model(config, seed) -> a random model; the parts that the tiny model has are the tiny model's own."""

    def build(config: mm.ModelConfig, seed: int) -> mm.MultimodalModel:
        model = build_model(config, seed)
        for part in ("language_model", "vision_encoder", "image_adapter", "extra_embeddings"):
            setattr(model, part, getattr(tiny_model, part))
        return model

    return build


@pytest.fixture(scope="session")
def bare_model(tiny_model) -> mm.MultimodalModel:
    """The same language model without eyes; to it an image's placeholder is a token like any other."""
    config = replace(tiny_model.config, vision_encoder=None, image_adapter=None)
    model = mm.MultimodalModel(replace(config, image_token_id=config.language_model.vocab_size + 7))
    model.language_model, model.extra_embeddings = tiny_model.language_model, tiny_model.extra_embeddings
    return model.eval()


@pytest.fixture(scope="session")
def tiny_processor(tokenizer, tiny_config) -> mm.Processor:
    return mm.Processor(tokenizer, tiny_config)


@pytest.fixture(scope="session")
def random_picture() -> Callable[..., Image.Image]:
    """random_picture(width, height, seed=0) -> RGB noise."""

    def picture(width: int = 28, height: int = 28, seed: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

    return picture


@pytest.fixture(scope="session")
def random_tiles() -> Callable[..., Tiles]:
    """random_tiles(seed=0, grid=(1, 1), size=28) -> Tiles of noise."""

    def tiles(seed: int = 0, grid: tuple[int, int] = (1, 1), size: int = 28) -> Tiles:
        generator = torch.Generator().manual_seed(seed)
        shape = (grid[0] * grid[1], 3, size, size)
        return Tiles(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), grid)

    return tiles


@pytest.fixture(scope="session")
def make_sample(tiny_config, random_tiles) -> Callable[..., mm.Sample]:
    """make_sample("..ii.", seed=0, grids=None) -> a sample: `.` is a random text token, `i` an image.

    The images have the given grids in turn, else one, two, one and four tiles.
    """

    def sample(pattern: str, seed: int = 0, grids: Sequence[tuple[int, int]] | None = None) -> mm.Sample:
        generator = torch.Generator().manual_seed(seed)
        vocab = tiny_config.language_model.vocab_size
        text = torch.randint(3, vocab, (len(pattern),), generator=generator).tolist()
        tokens = [
            tiny_config.image_token_id if mark == "i" else token for mark, token in zip(pattern, text, strict=True)
        ]
        grids = grids or ((1, 1), (1, 2), (1, 1), (2, 2))
        images = [random_tiles(100 * seed + n, grids[n % len(grids)]) for n in range(pattern.count("i"))]
        return mm.Sample(tokens, images=images)

    return sample


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


@pytest.fixture(scope="session")
def square_record() -> Callable[..., Record]:
    """square_record(number, split="train", caption=False) -> a coloured square on noise; its colour is the answer."""

    def record(number: int, split: str = "train", caption: bool = False) -> Record:
        generator = np.random.default_rng(number)
        colour = list(COLOURS)[number % len(COLOURS)]
        pixels = generator.integers(90, 160, (28, 28, 3), dtype=np.uint8)
        top, left = generator.integers(0, 12, 2)
        pixels[top : top + 16, left : left + 16] = COLOURS[colour]
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        name = f"square-{number:04d}"
        values = {"id": name, "split": split, "task": "caption" if caption else "vqa", "language": "en"}
        if caption:
            values["caption"] = f"a {colour} square"
        else:
            question = [{"type": "image", "image": "png"}, {"type": "text", "text": "what colour is the square?"}]
            values["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
        return Record(name, values, {"png": out.getvalue()})

    return record


@pytest.fixture(scope="session")
def squares(square_record, tmp_path_factory) -> Path:
    """Shards of coloured squares: 192 to train on (half with questions, half with captions), 32 each to hold out."""
    records = [square_record(n, caption=n >= 96) for n in range(192)]
    records += [square_record(1000 + n, "validation", caption=n >= 16) for n in range(32)]
    records += [square_record(2000 + n, "test", caption=n >= 16) for n in range(32)]
    folder = tmp_path_factory.mktemp("shards") / "squares"
    write_shards(records, folder, samples_per_shard=100)
    return folder


@pytest.fixture(scope="session")
def language_model_folder(tiny_model, tokenizer, tmp_path_factory) -> Path:
    """The tiny model's language model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("language_model")
    config = tiny_model.config.language_model
    LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary.theta},
        max_position_embeddings=config.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in tiny_model.language_model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tiny_model, tmp_path_factory) -> Path:
    """The tiny model's image encoder as a folder of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    save_vision_encoder(folder, tiny_model.vision_encoder)
    return folder


@pytest.fixture(scope="session")
def run_folder(tiny_model, tiny_processor, language_model_folder, tmp_path_factory) -> Path:
    """The whole tiny model as a run folder: not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    mm.run_folder.save(folder, tiny_model, tiny_processor, language_model=language_model_folder)
    return folder


@pytest.fixture(scope="session")
def everything_config(tiny_config) -> mm.ModelConfig:
    """The tiny model's configuration with every modality."""
    aggregator = AggregatorConfig(
        factor=4, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_time_frequencies=8
    )
    return replace(
        tiny_config,
        video_adapter=VideoAdapterConfig(aggregator=aggregator, interval=2),
        speech_encoder=SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2, max_seconds=0.8),
        speech_adapter=SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2),
    )


@pytest.fixture(scope="session")
def everything_run(everything_config, build_model, tokenizer, tmp_path_factory) -> Path:
    """A run folder of a tiny model that sees, watches and hears: not to be changed."""
    folder = tmp_path_factory.mktemp("everything")
    mm.run_folder.save(
        folder, build_model(everything_config, seed=3), mm.Processor(tokenizer, everything_config), bundle=True
    )
    return folder


@pytest.fixture
def mm_command(capsys):
    """mm_command(*arguments) -> (exit code, what is printed, what is said on stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


@pytest.fixture
def refused(mm_command):
    """refused(*arguments) -> the one line on stderr that ends the command; nothing is printed."""

    def run(*arguments) -> str:
        code, out, err = mm_command(*arguments, "--quiet")
        assert code == 1 and out == ""
        assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err and len(err) < 600
        return err.strip()

    return run
