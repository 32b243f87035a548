"""The training stages of the image demo: their order, the run folders of a recipe, and what a run has cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import configs
import stages.train_image_adapter
from demos.assets import fetch
from demos.command import stage_options
from demos.progress import Progress
from mm.run_files import CONFIG_FILE

LANGUAGE_MODEL = "smollm2-135m"
ADAPTER, QUESTIONS, ENCODER = Path("runs/demo"), Path("runs/demo-vqa"), Path("runs/demo-encoder")
ENCODER_CONFIG, QUESTIONS_CONFIG, ADAPTER_CONFIG = "demo/alignment.yaml", "demo/questions.yaml", "demo/adapter.yaml"


@dataclass(frozen=True)
class Recipe:
    """What a run of the demo trains with; None takes the configurations'. Each recipe has run folders of its own.

    Attributes:
        steps: of the last stage, which adds captions.
        question_steps: of the stage before, in which the adapter learns to answer.
        encoder_steps: of the first stage, which aligns a new image encoder with the language model.
        seed: of all stages.
        precision: "fp32" or "bf16"; None takes bf16 where the machine multiplies it in hardware.
        device: of training and evaluation; it has no folder of its own.
        output: of the adapter's run, in place of the folder that the settings above name.
    """

    steps: int | None = None
    question_steps: int | None = None
    encoder_steps: int | None = None
    seed: int | None = None
    precision: str | None = None
    device: str = "auto"
    output: Path | None = None

    @property
    def adapter(self) -> Path:
        """The run folder, such as runs/demo-300-questions-200-after-420-seed-1."""
        before = ("questions", self.question_steps), ("after", self.encoder_steps)
        return self.output or _folder(ADAPTER, self.steps, *before, *self._shared())

    @property
    def questions(self) -> Path:
        """The folder of the stage before, which runs that differ in the last stage's steps alone share."""
        return _folder(QUESTIONS, self.question_steps, ("after", self.encoder_steps), *self._shared())

    @property
    def encoder(self) -> Path:
        """The encoder's folder, which runs that differ in the adapter's steps alone share."""
        return _folder(ENCODER, self.encoder_steps, *self._shared())

    def _shared(self) -> tuple[tuple[str, int | None], str | None]:
        return ("seed", self.seed), self.precision

    def stage_runs(self) -> "list[StageRun]":
        """The stages in their order."""
        return [
            StageRun(
                title="image encoder",
                config=ENCODER_CONFIG,
                output=self.encoder,
                seconds=113.0,
                steps=self.encoder_steps,
                inputs={"--language_model": LANGUAGE_MODEL},
            ),
            StageRun(
                title="questions",
                config=QUESTIONS_CONFIG,
                output=self.questions,
                seconds=150.0,
                steps=self.question_steps,
                inputs={"--start_from": self.encoder},
            ),
            StageRun(
                title="captions",
                config=ADAPTER_CONFIG,
                output=self.adapter,
                seconds=85.0,
                steps=self.steps,
                inputs={"--start_from": self.questions},
            ),
        ]


@dataclass(frozen=True)
class StageRun:
    """One stage of a recipe.

    Attributes:
        title: for people.
        config: name of a shipped configuration.
        output: the run folder.
        seconds: that the configuration's steps take on the reference machine of `demos.progress`.
        steps: None takes the configuration's.
        inputs: option -> an earlier stage's folder, or the name of an asset to fetch.
    """

    title: str
    config: str
    output: Path
    seconds: float
    steps: int | None = None
    inputs: Mapping[str, Path | str] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return (self.output / CONFIG_FILE).exists()

    def run(self, recipe: Recipe) -> None:
        """Train, from the newest checkpoint of an interrupted run if there is one."""
        arguments = ["--config", str(configs.path(self.config)), "--output", str(self.output)]
        for option, source in self.inputs.items():
            arguments += [option, str(source if isinstance(source, Path) else fetch(source))]
        if recipe.seed is not None:
            arguments += ["--training.seed", str(recipe.seed)]
        stages.train_image_adapter.main([*arguments, *stage_options(recipe.device, self.steps, recipe.precision)])


def train(recipe: Recipe, progress: Progress | None = None) -> None:
    """Run the stages that are not finished, in order.

    Args:
        progress: knows the stages' titles; None: there are no other parts.
    """
    runs = recipe.stage_runs()
    progress = progress or Progress({stage.title: stage.seconds for stage in runs})
    for stage in runs:
        if stage.is_finished:
            progress.skip(stage.title)
        else:
            progress.begin(stage.title)
            stage.run(recipe)


def _folder(base: Path, steps: int | None, *settings: tuple[str, int | None] | str | None) -> Path:
    """`base` with the given settings in its name."""
    names = [base.name] if steps is None else [base.name, str(steps)]
    for setting in settings:
        if isinstance(setting, str):
            names.append(setting)
        elif setting is not None and setting[1] is not None:
            names.append(f"{setting[0]}-{setting[1]}")
    return base.with_name("-".join(names))
