"""A curation run, from a raw pool to shards: its configuration, its steps, and its stages in `run`.

The folder of a run:

- `parts`, `set`: the measured columns; an interrupted or repeated run continues from them.
- `canaries`: planted copies, and the pictures that they are joined to.
- `ledger.parquet`: the decisions about every pair; `sources.parquet`: where each pair was read.
- `shards`, `report.html`.
- `measured.yaml`, `decided.yaml`: the settings of the measurement, and of the last decision.
- `version.txt`: the version of what is stored; a folder of another version is refused.
- `clip_score.txt`, `video_score.txt`: the ids of the models of those scores.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import yaml
from PIL import Image

from data_prep.pipeline.canaries import FOLDER, CanariesConfig, plant
from data_prep.pipeline.deciding import decide
from data_prep.pipeline.ledger import LEDGER_NAME, write_ledger
from data_prep.pipeline.measuring import measure_all
from data_prep.pipeline.merging import merge
from data_prep.pipeline.pool import LocatedSources, RawSource, list_parts, source_root
from data_prep.pipeline.workers import Engine
from data_prep.pipeline.writing import WriteConfig, write
from data_prep.sources.files import Locate
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.clip_score import ClipScore, ClipScoreConfig, PairScorer
from data_prep.steps.clips import ClipLength
from data_prep.steps.concepts import Concepts
from data_prep.steps.deduplication.embedders import SSCD, LowFrequencies
from data_prep.steps.faces import CenterFace, Faces, FacesConfig
from data_prep.steps.hash_lists import HashLists, HashListsConfig, read_lists
from data_prep.steps.image_rules import ImageRules
from data_prep.steps.motion import Motion
from data_prep.steps.near_duplicates import NearDuplicates, NearDuplicatesConfig
from data_prep.steps.ngrams import read_vocabulary
from data_prep.steps.nsfw import Nsfw, NsfwConfig, OpenNsfw
from data_prep.steps.ocr import Ocr, OcrConfig, RapidOcr
from data_prep.steps.overlay_text import OverlayText, OverlayTextConfig
from data_prep.steps.readable import Readable
from data_prep.steps.resampling import Resampling, ResamplingConfig
from data_prep.steps.step import STORED, Step
from data_prep.steps.video_score import MeanOverFrames, VideoScore, VideoScoreConfig, VideoScorer
from foundation.errors import UserError
from foundation.options import new_parser, read_options

logger = logging.getLogger(__name__)

MEASURED, DECIDED, VERSION = "measured.yaml", "decided.yaml", "version.txt"

LoadScorer = Callable[[ClipScoreConfig | VideoScoreConfig], PairScorer]
LoadVideoScorer = Callable[[VideoScoreConfig], VideoScorer]  # default: the mean over frames of a PairScorer's scores


@dataclass(frozen=True)
class CurationConfig:
    """The settings of a curation run; a step that is null is left out.

    Attributes:
        output: folder of the run.
        sources: the pool.
        seed: of the resampling.
        workers: processes; the result does not depend on their number.
        engine: "in_process": processes of this machine; "ray": a Ray cluster whose nodes see the same folders.
        svg_size: px, the long side of rendered SVG files.
        canaries: edited copies that are planted to measure how many near duplicates the run finds.
    """

    output: str
    sources: tuple[RawSource, ...]
    hash_lists: HashListsConfig | None = None
    nsfw: NsfwConfig | None = None
    caption_rules: CaptionRules | None = None
    image_rules: ImageRules | None = None
    overlay_text: OverlayTextConfig | None = None
    clip_score: ClipScoreConfig | None = None
    video_score: VideoScoreConfig | None = None
    motion: Motion | None = None
    near_duplicates: NearDuplicatesConfig | None = None
    resampling: ResamplingConfig | None = None
    faces: FacesConfig | None = None
    ocr: OcrConfig | None = None
    write: WriteConfig = field(default_factory=WriteConfig)
    seed: int = 0
    workers: int = 1
    engine: Engine = "in_process"
    svg_size: int = 672
    canaries: CanariesConfig | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("sources is empty; name at least one source of pairs")
        names = [source.path for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"two sources have the same path: {', '.join(names)}")
        for name in ("workers", "svg_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.canaries is not None and self.near_duplicates is None:
            raise UserError("canaries are planted for near_duplicates, which is null; give both or none")
        self._check_media()

    def _check_media(self) -> None:
        if len({source.media for source in self.sources}) > 1:
            raise UserError("some sources are of pictures and some of clips; give each kind a run of its own")
        clips = self.sources[0].media == "clips"
        for name in ("faces", "ocr", "canaries") if clips else ("overlay_text", "video_score", "motion"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name} is for {'pictures' if clips else 'clips'}, which the sources are not; set it to null"
                )
        if clips and self.write.max_side is not None:
            raise UserError("write.max_side is for pictures: clips are written unchanged; set it to null")


def steps_of(
    config: CurationConfig,
    locate: Locate,
    load_scorer: LoadScorer | None = None,
    load_video_scorer: LoadVideoScorer | None = None,
) -> list[Step]:
    """The steps of a run, in the order in which they decide; those that hide or quarantine pictures come first.

    Args:
        locate: maps a path of the configuration to a local path.
        load_scorer: loads the model of the CLIP score, and of the video score without `load_video_scorer`.
        load_video_scorer: loads the model of the video score.

    Raises:
        UserError: a file that the configuration names, a package, or one of the two functions is missing.
    """
    steps: list[Step] = []
    if config.hash_lists is not None:
        lists = read_lists([locate(path) for path in config.hash_lists.lists])
        steps.append(HashLists(lists, config.hash_lists.max_distance))
    if config.nsfw is not None:
        steps.append(Nsfw(config.nsfw, OpenNsfw.of_package()))
    steps.append(Readable())
    if config.sources[0].media == "clips":
        steps.append(ClipLength())
    if config.write.split_by == "concept":
        captions = {source.path: source.captions for source in config.sources}
        steps.append(Concepts(captions, {path: source_root(locate(path)) for path in captions}))
    steps += [step for step in (config.caption_rules, config.image_rules) if step is not None]
    if config.overlay_text is not None:
        steps.append(OverlayText(config.overlay_text, RapidOcr.of_package()))
    if config.clip_score is not None:
        if load_scorer is None:
            raise UserError("clip_score needs a model, which `mm data` loads; from Python, pass load_scorer")
        steps.append(ClipScore(config.clip_score, load_scorer(config.clip_score)))
    if config.video_score is not None:
        if load_video_scorer is not None:
            scorer = load_video_scorer(config.video_score)
        elif load_scorer is not None:
            scorer = MeanOverFrames(load_scorer(config.video_score))
        else:
            raise UserError("video_score needs a model, which `mm data` loads; from Python, pass load_video_scorer")
        steps.append(VideoScore(config.video_score, scorer))
    if config.motion is not None:
        steps.append(config.motion)
    if config.near_duplicates is not None:
        steps.append(near_duplicates_step(config, locate))
    if config.resampling is not None:
        steps.append(Resampling(config.resampling, read_vocabulary(locate(config.resampling.text)), config.seed))
    if config.faces is not None:
        steps.append(Faces(config.faces, CenterFace.of_file(locate(config.faces.model), config.faces.max_side)))
    if config.ocr is not None:
        steps.append(Ocr(config.ocr, RapidOcr.of_package()))
    return steps


def near_duplicates_step(config: CurationConfig, locate: Locate) -> NearDuplicates:
    """The step of near duplicates, of a configuration that has it."""
    assert config.near_duplicates is not None
    weights = config.near_duplicates.sscd
    embedder = LowFrequencies() if weights is None else SSCD.of_file(locate(weights))
    return NearDuplicates(config.near_duplicates, embedder, config.clip_score is not None)


@dataclass(frozen=True)
class _StoredScorer:
    """Stands for the model of stored scores: a decision needs its id alone."""

    id: str

    def score(self, picture: Image.Image | Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        raise AssertionError("a decision measures nothing")


def deciding_steps_of(work: Path, config: CurationConfig, locate: Locate) -> list[Step]:
    """The steps for a new decision about a finished run; loads no model of scores.

    Args:
        config: settings that may differ from the run's.
    """
    measured = read_run(work)[0]

    def stored_scorer(step: str, new: ClipScoreConfig | VideoScoreConfig) -> _StoredScorer:
        old, names = getattr(measured, step), (new.model, new.pretrained)
        if old is None or names != (old.model, old.pretrained):
            return _StoredScorer(" ".join(names))
        path = _scorer_file(work, step)
        if not path.is_file():
            raise UserError(f"{path}: missing; it holds the id of the scores' model, and `mm data run` writes it")
        return _StoredScorer(path.read_text(encoding="utf-8"))

    return steps_of(config, locate, partial(stored_scorer, ClipScore.name), partial(stored_scorer, VideoScore.name))


def _scorer_file(work: Path, step: str) -> Path:
    return work / f"{step}.txt"


def run(
    config: CurationConfig,
    locate: Locate = Path,
    load_scorer: LoadScorer | None = None,
    load_video_scorer: LoadVideoScorer | None = None,
) -> int:
    """Runs all stages: pool, measuring, merging, deciding, writing. Stages that an earlier run has done are skipped.

    Args:
        locate, load_scorer, load_video_scorer: see `steps_of`.

    Returns:
        how many pairs are kept.

    Raises:
        UserError: a source or a file that the configuration names is missing or unusable, or the folder of the run is
            of another version.
    """
    work = Path(config.output)
    if (work / "parts").exists() or (work / DECIDED).exists():
        _check_version(work)
    steps = steps_of(config, locate, load_scorer, load_video_scorer)
    parts = [part for source in config.sources for part in list_parts(source, locate(source.path).absolute())]
    work.mkdir(parents=True, exist_ok=True)
    (work / VERSION).write_text(f"{STORED}\n")
    logger.info("measuring %d parts of the pool", len(parts))
    measured = measure_all(parts, steps, config.svg_size, work / "parts", config.workers, config.engine)
    logger.info("merging the parts into %s", work / "set")
    merge(measured, steps, work / "set")
    _copy(work / "set" / "sources.parquet", work / "sources.parquet")
    _plant_canaries(work, config, steps, locate)
    for step in steps:
        if isinstance(step, ClipScore | VideoScore):
            _scorer_file(work, step.name).write_text(step.scorer.id, encoding="utf-8")
    _save(config, work / MEASURED)
    logger.info("deciding")
    _decide(work, config, steps)
    logger.info("writing the shards into %s", work / "shards")
    return write_kept(work, locate)


def rethreshold(work: Path, config: CurationConfig, locate: Locate = Path) -> None:
    """Decides again about the pairs of a finished run, from the stored columns; `write_kept` then writes the shards.

    Args:
        work: folder of the run.
        config: the settings of the run with other thresholds.

    Raises:
        UserError: the settings need columns that the run has not stored; names the setting and its limit.
    """
    measured, _ = read_run(work)
    changed = [name for name in ("sources", "svg_size", "canaries") if getattr(config, name) != getattr(measured, name)]
    if changed:
        raise UserError(f"{', '.join(changed)} cannot be changed without `mm data run`, which reads the pool by it")
    old = {step.name: step for step in deciding_steps_of(work, measured, locate)}
    steps = deciding_steps_of(work, config, locate)
    names = {step.name for step in steps}
    for step in old.values():
        if step.hides_pictures and step.name not in names:
            raise UserError(
                f"{step.name} cannot be left out without `mm data run`: no other step has measured the pictures that "
                "it hides"
            )
    for step in steps:
        if step.name in old:
            step.check_compatible(old[step.name])
        elif step.measures is not None:
            raise UserError(f"{step.name} was not part of the run; `mm data run` measures what it needs")
    _decide(work, config, steps)


def write_kept(work: Path, locate: Locate = Path) -> int:
    """Writes the shards of the pairs that the ledger of a run keeps, and returns the number of pairs."""
    _, config = read_run(work)
    sources, steps = located_sources(config, locate), deciding_steps_of(work, config, locate)
    return write(work, sources, steps, config.write, config.svg_size, config.workers, config.engine)


def read_run(work: Path) -> tuple[CurationConfig, CurationConfig]:
    """The settings of a run's measurement, and those of its last decision.

    Raises:
        UserError: the folder holds no finished run, or one of another version.
    """
    if not (work / DECIDED).is_file():
        raise UserError(f"{work}: holds no finished run; `mm data run` makes one")
    _check_version(work)
    return read_config(work / MEASURED), read_config(work / DECIDED)


def _check_version(work: Path) -> None:
    path = work / VERSION
    version = path.read_text().strip() if path.is_file() else "2 or earlier"
    if version != str(STORED):
        raise UserError(
            f"{work}: stores measurements of version {version}, and this is version {STORED}, whose ids and values "
            "differ; let `mm data run` write into another folder, or delete this one first"
        )


def read_config(path: Path, changes: Sequence[str] = ()) -> CurationConfig:
    """The settings of a YAML file, changed by options such as `--image_rules.min_short_side 64`.

    Raises:
        UserError: a key or a value is not one of `CurationConfig`'s.
    """
    return parse_config(["--config", str(path), *changes])


def parse_config(argv: Sequence[str], prog: str = "mm data run") -> CurationConfig:
    """As `read_config`, of a command line with `--config FILE` in it; ends the process after `--help`."""
    parser = new_parser(prog, "Curate a raw pool of image-text pairs into shards.", config=True)
    parser.add_class_arguments(CurationConfig)
    values = read_options(parser, argv)
    return CurationConfig(**{name: values[name] for name in CurationConfig.__dataclass_fields__})


def _decide(work: Path, config: CurationConfig, steps: Sequence[Step]) -> None:
    finishing = {step.name: step.settings() for step in steps if step.finish_columns is not None}
    write_ledger(decide(work / "set", steps, {**asdict(config.write), **finishing}), work / LEDGER_NAME)
    _save(config, work / DECIDED)


def located_sources(config: CurationConfig, locate: Locate) -> LocatedSources:
    """The sources of a run with their local files or folders, by their path in the configuration."""
    return {source.path: (source, locate(source.path).absolute()) for source in config.sources}


def _plant_canaries(work: Path, config: CurationConfig, steps: Sequence[Step], locate: Locate) -> None:
    if config.canaries is None:  # canaries of an earlier run are not of this set
        shutil.rmtree(work / FOLDER, ignore_errors=True)
        return
    (step,) = (step for step in steps if isinstance(step, NearDuplicates))
    sources = located_sources(config, locate)
    plant(work, step, sources, config.canaries, config.svg_size, config.workers, config.engine)


def _save(config: CurationConfig, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
