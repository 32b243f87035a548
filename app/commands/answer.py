"""`mm caption`, `mm ask` and `mm transcribe`: files and words in, what a model says of them out."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import Namespace

import mm
from foundation.errors import UserError, one_line
from mm.generation import transcribe_tokens
from speech.prompts import TRANSCRIBE
from video.readers import is_animation, open_animation
from video.timeline import MAX_PIXELS

MEDIA = {"image": "pictures", "video": "clips", "audio": "sounds"}  # kind of a message's part -> what it is
FILMS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ogv", ".flv", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts", ".vob", ".mxf", ".dv", ".rm"),
)
WHAT_IS_A_CLIP = (
    f"a clip is a file named {', '.join(FILMS)}, and where the model has a video adapter a GIF or WebP file of "
    "several pictures too; all else is a picture, of which the first is taken"
)


def caption(arguments: Namespace) -> int:
    """Caption pictures and clips."""
    model, processor = load_model(arguments)

    def describe(file: str) -> str:
        kind = "video" if is_clip(file, animations=model.video_adapter is not None) else "image"
        sample = processor.caption_prompt_for(file, kind)
        return processor.decode(mm.generate_tokens(model, [sample], arguments.max_new_tokens)[0])

    return _each(arguments.files, describe)


def ask(arguments: Namespace) -> int:
    """Ask a question about pictures, clips and sounds."""
    if not arguments.question.strip():
        raise UserError("the question is empty")
    if not arguments.media:
        raise UserError("nothing to ask about: give --image, --video or --audio, each with one file or several")
    model, processor = load_model(arguments)
    content = [{"type": kind, kind: file} for kind, file in arguments.media]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": arguments.question}]}]
    for piece in mm.stream(
        model,
        processor,
        messages,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()
    return 0


def transcribe(arguments: Namespace) -> int:
    """Write down what is said in sound files."""
    if not arguments.language.strip():
        raise UserError("the language is empty; name one, such as English")
    model, processor = load_model(arguments)
    if model.speech_encoder is None:
        raise UserError(f"{arguments.model} has no speech_encoder: `mm train train_speech_adapter` gives a run ears")
    request = {"type": "text", "text": f"{TRANSCRIBE} {arguments.language}:"}

    def write_down(file: str) -> str:
        content = [request, {"type": "audio", "audio": file}]
        sample = processor.prompt([{"role": "user", "content": content}])
        return processor.decode(transcribe_tokens(model, [sample], arguments.max_new_tokens)[0])

    return _each(arguments.files, write_down)


def load_model(arguments: Namespace) -> tuple[mm.MultimodalModel, mm.Processor]:
    """The model that a command's options name."""
    return mm.load(arguments.model, device=arguments.device, language_model=arguments.language_model)


class Medium:
    """The type of an option that shares its place with those of other kinds: FILE -> (kind, FILE), so order is kept."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return "path"  # what the help shows

    def __call__(self, file: str | tuple[str, str]) -> tuple[str, str]:
        return file if isinstance(file, tuple) else (self.kind, file)  # what was read is checked once more


def is_clip(file: str, animations: bool) -> bool:
    """Whether a file is to be watched rather than looked at, see WHAT_IS_A_CLIP.

    Args:
        animations: a GIF or WebP file of several pictures counts as one.

    Raises:
        UserError: a GIF or WebP file that is broken.
        OSError: it cannot be read.
    """
    path = Path(file)
    if path.suffix.lower() in FILMS:
        return True
    if not animations or not path.is_file():
        return False
    data = path.read_bytes()
    if not is_animation(data):
        return False
    with open_animation(data, MAX_PIXELS) as picture:
        return getattr(picture, "n_frames", 1) > 1


def _each(files: Sequence[str], do: Callable[[str], str]) -> int:
    """Do every file that can be done, then list what failed and why."""
    failed = []
    for file in files:
        try:
            print(f"{file}: {do(file)}", flush=True)
        except ValueError as error:
            reason = one_line(error)
            failed.append(reason if reason.startswith(file) else f"{file}: {reason}")
    for reason in failed:
        print(f"mm: failed: {reason}", file=sys.stderr)
    return 1 if failed else 0
