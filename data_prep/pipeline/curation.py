"""From a raw pool to shards: the configuration of a run, and its walk from one stage to the next.

The folder of a run: `parts` and `set`, what was measured (kept, so that an interrupted or repeated run goes on where it
was); `canaries`, planted copies and what found them; `ledger.parquet`, what became of every pair; `sources.parquet`,
where each lay; `shards`; `report.html`; `measured.yaml` and `decided.yaml`, the settings of the run and those of the
last decision; `clip_score.txt` and `video_score.txt`, the ids of the models that those scores are of.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from data_prep.pipeline.canaries import FOLDER, CanariesConfig, plant
from data_prep.pipeline.deciding import decide
from data_prep.pipeline.ledger import LEDGER_NAME, write_ledger
from data_prep.pipeline.measuring import measure_all
from data_prep.pipeline.merging import merge
from data_prep.pipeline.pool import Places, RawSource, parts_of, root_of
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
from data_prep.steps.ngrams import vocabulary_of
from data_prep.steps.nsfw import Nsfw, NsfwConfig, OpenNsfw
from data_prep.steps.ocr import Ocr, OcrConfig, RapidOcr
from data_prep.steps.overlay_text import OverlayText, OverlayTextConfig
from data_prep.steps.readable import Readable
from data_prep.steps.resampling import Resampling, ResamplingConfig
from data_prep.steps.step import Step
from data_prep.steps.video_score import MeanOverFrames, VideoScore, VideoScoreConfig, VideoScorer
from foundation.errors import UserError

MEASURED, DECIDED = "measured.yaml", "decided.yaml"

LoadScorer = Callable[[ClipScoreConfig | VideoScoreConfig], PairScorer]  # None where a caller knows no model
LoadVideoScorer = Callable[[VideoScoreConfig], VideoScorer]  # None: the mean over frames of what LoadScorer gives


@dataclass(frozen=True)
class Curate:
    """A run of the curation; a step that is null is left out.

    Attributes:
        output: folder of the run.
        sources: the pool.
        seed: of the resampling.
        workers: processes; the result is the same for any number.
        engine: whose: of this machine, or of Ray, on one machine or a cluster that sees the same folders.
        svg_size: pixels, the long side that SVG files are drawn with.
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

    def __post_init__(self):
        if not self.sources:
            raise UserError("sources is empty; name at least one place to take pairs from")
        names = [source.path for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"a source is named twice: {', '.join(names)}")
        for name in ("workers", "svg_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.canaries is not None and self.near_duplicates is None:
            raise UserError("canaries are planted for near_duplicates, which is null; give both or none")
        self._check_media()

    def _check_media(self) -> None:
        if len({source.media for source in self.sources}) > 1:
            raise UserError("sources are of pictures and of clips; give each kind a run of its own")
        clips = self.sources[0].media == "clips"
        for name in ("faces", "ocr", "canaries") if clips else ("overlay_text", "video_score", "motion"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name} is for {'pictures' if clips else 'clips'}, which the sources are not; set null"
                )
        if clips and self.write.max_side is not None:
            raise UserError("write.max_side is for pictures: clips are written as they are; set it to null")


def steps_of(
    config: Curate,
    locate: Locate,
    load_scorer: LoadScorer | None = None,
    load_video_scorer: LoadVideoScorer | None = None,
) -> list[Step]:
    """The steps of a run, in the order in which they decide: first what decides who may see a picture."""
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
        steps.append(Concepts(captions, {path: root_of(locate(path)) for path in captions}))
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
        steps.append(near_duplicates_of(config, locate))
    if config.resampling is not None:
        steps.append(Resampling(config.resampling, vocabulary_of(locate(config.resampling.text)), config.seed))
    if config.faces is not None:
        steps.append(Faces(config.faces, CenterFace.of_file(locate(config.faces.model), config.faces.max_side)))
    if config.ocr is not None:
        steps.append(Ocr(config.ocr, RapidOcr.of_package()))
    return steps


def near_duplicates_of(config: Curate, locate: Locate) -> NearDuplicates:
    """That one step, of a configuration that has it."""
    weights = config.near_duplicates.sscd
    embedder = LowFrequencies() if weights is None else SSCD.of_file(locate(weights))
    return NearDuplicates(config.near_duplicates, embedder, config.clip_score is not None)


@dataclass(frozen=True)
class _ScoredBefore:
    """The scorer of stored scores, of which nothing but the id is needed to decide by them."""

    id: str

    def score(self, picture: Image.Image | Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        raise AssertionError("deciding measures nothing")


def deciding_steps_of(work: Path, config: Curate, locate: Locate) -> list[Step]:
    """The steps of a finished run with settings that may differ, for deciding alone: no scorer's model is loaded."""
    run_with = read_run(work)[0]

    def scored_before(wanted: ClipScoreConfig | VideoScoreConfig, step: str) -> _ScoredBefore:
        measured, names = getattr(run_with, step), (wanted.model, wanted.pretrained)
        if measured is None or names != (measured.model, measured.pretrained):
            return _ScoredBefore(" ".join(names))
        path = _scorer_file(work, step)
        if not path.is_file():
            raise UserError(f"{path}: missing; it says what the scores are of, and `mm data run` writes it")
        return _ScoredBefore(path.read_text(encoding="utf-8"))

    return steps_of(
        config, locate, partial(scored_before, step=ClipScore.name), partial(scored_before, step=VideoScore.name)
    )


def _scorer_file(work: Path, step: str) -> Path:
    return work / f"{step}.txt"


def run(
    config: Curate,
    locate: Locate = Path,
    load_scorer: LoadScorer | None = None,
    load_video_scorer: LoadVideoScorer | None = None,
) -> int:
    """Reads, measures, decides and writes; what an earlier run of the same folder has done is not done again.

    Returns:
        how many pairs are kept.

    Raises:
        UserError: something that the configuration names is not there, or not what it should be; nothing is kept.
    """
    work = Path(config.output)
    steps = steps_of(config, locate, load_scorer, load_video_scorer)
    parts = [part for source in config.sources for part in parts_of(source, locate(source.path).absolute())]
    work.mkdir(parents=True, exist_ok=True)
    measured = measure_all(parts, steps, config.svg_size, work / "parts", config.workers, config.engine)
    merge(measured, steps, work / "set")
    _copy(work / "set" / "sources.parquet", work / "sources.parquet")
    _plant(work, config, steps, locate)
    for step in steps:
        if isinstance(step, ClipScore | VideoScore):
            _scorer_file(work, step.name).write_text(step.scorer.id, encoding="utf-8")
    _save(config, work / MEASURED)
    _decide(work, config, steps)
    return write_kept(work, locate)


def rethreshold(work: Path, config: Curate, locate: Locate = Path) -> None:
    """Decides anew about the pairs of a finished run, from what is stored of them.

    `write_kept` then writes the shards.

    Args:
        config: that of the run, other thresholds aside.

    Raises:
        UserError: the settings ask for what the run has not stored; names the setting and its floor.
    """
    measured, _ = read_run(work)
    changed = [name for name in ("sources", "svg_size", "canaries") if getattr(config, name) != getattr(measured, name)]
    if changed:
        raise UserError(f"{', '.join(changed)} cannot be changed without `mm data run`: the pool is read by it")
    old = {step.name: step for step in deciding_steps_of(work, measured, locate)}
    steps = deciding_steps_of(work, config, locate)
    for step in old.values():
        if step.hides and step.name not in {one.name for one in steps}:
            raise UserError(
                f"{step.name} cannot be left out without `mm data run`: what it hides from all other steps was looked "
                "at no further, so nothing could be decided about it"
            )
    for step in steps:
        if step.name not in old and step.over is None:
            continue
        if step.name not in old:
            raise UserError(f"{step.name} was not part of the run; `mm data run` measures what it needs")
        step.refuse(old[step.name])
    _decide(work, config, steps)


def write_kept(work: Path, locate: Locate = Path) -> int:
    """Writes the shards of the pairs that the ledger of a run keeps, and returns their number."""
    _, config = read_run(work)
    sources, steps = places_of(config, locate), deciding_steps_of(work, config, locate)
    return write(work, sources, steps, config.write, config.svg_size, config.workers, config.engine)


def read_run(work: Path) -> tuple[Curate, Curate]:
    """The settings that a run was measured with, and those that it was decided with last.

    Raises:
        UserError: there is no finished run in the folder.
    """
    if not (work / DECIDED).is_file():
        raise UserError(f"{work}: no finished run of `mm data run` lies there")
    return read_config(work / MEASURED), read_config(work / DECIDED)


def read_config(path: Path, changes: Sequence[str] = ()) -> Curate:
    """The settings of a YAML file, changed by options such as `--image_rules.min_short_side 64`.

    Raises:
        jsonargparse.ArgumentError: they are not as `Curate` has them.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Curate)
    built = parser.instantiate(parser.parse_args(["--config", str(path), *changes]))
    return Curate(**{name: built[name] for name in Curate.__dataclass_fields__})


def _decide(work: Path, config: Curate, steps: Sequence[Step]) -> None:
    finishing = {step.name: step.settings() for step in steps if step.finishes is not None}
    write_ledger(decide(work / "set", steps, {**asdict(config.write), **finishing}), work / LEDGER_NAME)
    _save(config, work / DECIDED)


def places_of(config: Curate, locate: Locate) -> Places:
    """The sources of a run and their local folders, by the path that the configuration names."""
    return {source.path: (source, locate(source.path).absolute()) for source in config.sources}


def _plant(work: Path, config: Curate, steps: Sequence[Step], locate: Locate) -> None:
    if config.canaries is None:  # those of an earlier run say nothing of this one
        shutil.rmtree(work / FOLDER, ignore_errors=True)
        return
    for step in steps:
        if isinstance(step, NearDuplicates):
            plant(
                work, step, places_of(config, locate), config.canaries, config.svg_size, config.workers, config.engine
            )


def _save(config: Curate, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
