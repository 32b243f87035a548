"""The commands that the README shows, and what a run must answer to them."""

import logging
from dataclasses import dataclass
from pathlib import Path

import mm
from mm.modalities import IMAGE

FOLDER = Path(__file__).parent.parent / "examples"  # of the checkout; a wheel does not hold it
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadmeExample:
    """A picture of `examples/` and what is expected of it.

    Attributes:
        picture: the file's name.
        question: None asks for a caption.
        words: the answer is one of these exactly; a caption contains one of them.
    """

    picture: str
    question: str | None
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """What a reader of the README types."""
        if self.question is None:
            return f"mm caption examples/{self.picture}"
        return f'mm ask "{self.question}" --image examples/{self.picture}'

    def is_right(self, answer: str) -> bool:
        if self.question is not None:
            return answer in self.words
        return any(word in answer.lower() for word in self.words)

    def answer(self, model: mm.MultimodalModel, processor: mm.Processor) -> str:
        """The answer that the command prints."""
        file = str(FOLDER / self.picture)
        if self.question is None:
            sample = processor.caption_prompt_for(file, IMAGE.name)
            return processor.decode(mm.generate_tokens(model, [sample], 64)[0])
        content = [{"type": "image", "image": file}, {"type": "text", "text": self.question}]
        return mm.generate(model, processor, [{"role": "user", "content": content}], 128)


EXAMPLES = (
    ReadmeExample("boat.png", None, ("boat", "ship", "sail")),
    ReadmeExample("circle.png", "what color is the shape?", ("blue",)),
    ReadmeExample("circle.png", "is there a circle?", ("yes",)),
)


def check_examples(model: mm.MultimodalModel, processor: mm.Processor) -> list[str]:
    """A line for each example: the command, its answer, and whether that is right.

    Where the pictures are missing, as beside an installed wheel, none; the log says so.
    """
    if not all((FOLDER / example.picture).is_file() for example in EXAMPLES):
        logger.info("the README's examples are left out: their pictures are in the checkout, not in %s", FOLDER)
        return []
    lines = []
    for example in EXAMPLES:
        answer = example.answer(model, processor)
        verdict = "ok" if example.is_right(answer) else f"NOT what is expected: {' or '.join(example.words)}"
        lines.append(f"{example.command} -> {answer!r}: {verdict}")
    return lines
