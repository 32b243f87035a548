"""Pre-trains a small image encoder contrastively on image-text pairs (paper §7.1).

    mm train pretrain_image_encoder --config configs/demo/encoder.yaml

The image encoder and a text tower train from scratch; nothing is frozen, and the text tower is not kept. The paper's
encoder was trained on 2.5 billion pairs; a released one (MetaCLIP ViT-H/14) is converted by `mm convert open-clip` and
needs no such stage. The output is an encoder folder, from which `train_image_adapter` starts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import open_clip
from torch import nn

from foundation.errors import UserError
from layers.meta import meta_device
from layers.sources import draw_later
from mm.config import ModelConfig
from mm.device import resolve_device
from mm.encoder_folders import save_vision_encoder
from mm.modalities import IMAGE
from mm.parallel.process_group import Ranks
from mm.records import content_texts, record_caption, record_pictures
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.contrastive import (
    CHECKPOINTED_MODULES,
    FSDP_MODULES,
    ContrastiveModel,
    ContrastiveObjective,
    Pair,
    PairBatch,
    PairsShape,
    TextTowerConfig,
    batch_flops,
)
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.devices import peak_rates
from mm.training.media import check_media
from mm.training.offload import refuse_frozen_savings
from mm.training.optimizer import apply_learning_rates
from mm.training.stage_shapes import PlannedStage
from mm.training.trainer import Trainer
from shards.format import Record
from vision.encoder import VisionEncoderConfig, initialise_encoder
from vision.reading import read_picture
from vision.tiling import tile_image

# Settings that may change when an interrupted run resumes; `mm.training.trainer` checks `training` itself.
NOT_IN_FINGERPRINT = ("output", "training", "validation", "validation_pairs", "device")


@dataclass
class PretrainImageEncoder:
    """Configuration of the stage.

    Attributes:
        output: folder of the run, and of the encoder at its end.
        data: shards of images with captions or conversations.
        encoder: shape of the image encoder. text: shape of the text tower.
        loss: "clip" (softmax over all texts and over all images of a step) or "siglip" (a sigmoid for each pair).
        validation: shards on which retrieval is reported; null: none. validation_pairs: pairs of it.
        max_tiles: tiles per image; null takes as many as the encoder does.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    encoder: VisionEncoderConfig = field(default_factory=VisionEncoderConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    loss: str = "clip"
    validation: DataSource | None = None
    validation_pairs: int = 500
    max_tiles: int | None = None
    device: str = "auto"


def pretrain_image_encoder(config: PretrainImageEncoder) -> None:
    """Pre-train an image encoder contrastively, with a text tower that is not kept."""
    max_tiles = config.encoder.max_num_tiles if config.max_tiles is None else config.max_tiles
    check(config, max_tiles)
    device = resolve_device(config.device)
    with meta_device() as initial:
        model = ContrastiveModel(config.encoder, config.text, config.loss)
        initialise_encoder(model.vision_encoder)
    draw_later(model, initial.of(model), config.training.seed)
    tokenizer = open_clip.SimpleTokenizer(context_length=config.text.context)
    prepare = partial(image_text_pair, tokenizer=tokenizer, tile_size=config.encoder.tile_size, max_tiles=max_tiles)
    dataset = RecordDataset(config.data, prepare)
    check_media(dataset, IMAGE, shown=lambda record: bool(IMAGE.suffixes(record.media)))
    trained = apply_learning_rates(model, config.training.learning_rates)
    flops = partial(batch_flops, encoder=config.encoder, text=config.text, trained=trained)
    objective = ContrastiveObjective(flops)
    evaluate = None
    if config.validation:
        held_out = RecordDataset([config.validation], prepare)
        batch = objective.collate(readable_samples(held_out, config.validation_pairs))
        evaluate = partial(recall_at_1, batch=batch.to(device))
    output = Path(config.output)
    Trainer(
        model,
        objective,
        dataset,
        config.training,
        output,
        name="image encoder",
        device=device,
        evaluate=evaluate,
        checkpointed_modules=CHECKPOINTED_MODULES,
        fsdp_modules=FSDP_MODULES,
        sample_costs=dataset.num_tiles(config.encoder.tile_size, max_tiles),
        peak_rates=peak_rates(device, config.training.precision, config.training.peak_tflops),
        identity={name: value for name, value in asdict(config).items() if name not in NOT_IN_FINGERPRINT},
    ).run()
    save_vision_encoder(output, model.vision_encoder, write=Ranks.current().is_main)


def planned(config: PretrainImageEncoder, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: whose image encoder takes the place of the configuration's."""
    encoder = config.encoder if model is None or model.vision_encoder is None else model.vision_encoder
    shape = PairsShape(encoder, config.text, config.loss)
    return PlannedStage(shape, IMAGE, 0, encoder.tile_size, encoder.max_num_tiles, config.max_tiles)


def check(config: PretrainImageEncoder, max_tiles: int) -> None:
    """Check the settings that contrastive training limits.

    Raises:
        UserError: micro-batches, tensor or pipeline parallelism, or more tiles than the encoder takes.
    """
    if config.training.micro_batch_size not in (None, config.training.batch_size) or config.training.micro_batch_tokens:
        raise UserError(
            "contrastive training compares all pairs of a step: leave training.micro_batch_size and "
            "training.micro_batch_tokens out"
        )
    if config.training.tp * config.training.pp > 1:
        raise UserError("this stage has no tensor or pipeline parallelism: leave training.tp and training.pp at 1")
    refuse_frozen_savings(config.training)
    if not 1 <= max_tiles <= config.encoder.max_num_tiles:
        raise UserError(f"max_tiles is {max_tiles}; the encoder takes 1 to {config.encoder.max_num_tiles}")


def image_text_pair(record: Record, tokenizer: open_clip.SimpleTokenizer, tile_size: int, max_tiles: int) -> Pair:
    """A record's first image and its text (`record_text`)."""
    image = read_picture(record_pictures(record)[0])
    return Pair(tile_image(image, tile_size, max_tiles), tokenizer(record_text(record))[0])


def record_text(record: Record) -> str:
    """A record's caption, or the text of all its messages."""
    if "messages" not in record.json or "caption" in record.json:
        return record_caption(record)
    where = f"a message of record {record.id}"
    return " ".join(text for message in record.json["messages"] for text in content_texts(message["content"], where))


def recall_at_1(model: nn.Module, batch: PairBatch) -> dict[str, float]:
    """The share of the batch's images whose nearest text is their own, or one of the same tokens."""
    images, texts = model(batch)
    nearest = (images @ texts.T).argmax(1)
    is_own = (batch.texts[nearest] == batch.texts).all(1)
    return {"recall_at_1": float(is_own.float().mean())}


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(PretrainImageEncoder, pretrain_image_encoder, argv, "pretrain_image_encoder")


if __name__ == "__main__":
    main()
