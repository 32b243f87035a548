"""CLIP score: the cosine of an image and its caption, by any open_clip model. `mm data` passes it to `data_prep`."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from foundation.errors import UserError, one_line
from foundation.hashing import file_sha256

MAX_REASON = 300  # characters of open_clip's own message in ours


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model as a `data_prep.steps.clip_score.PairScorer`: one image or caption at a time, on one thread.

    Attributes:
        model: open_clip's name of the model, such as ViT-B-32.
        pretrained: file of its weights.
        sha256: of that file.
    """

    model: str
    pretrained: Path
    sha256: str

    @classmethod
    def of_file(cls, model: str, pretrained: Path) -> "OpenClip":
        """The scorer of a model and a file of its weights.

        Raises:
            UserError: open_clip does not know the name, or the file cannot be read.
        """
        import open_clip

        known = open_clip.list_models()
        if model not in known:
            similar = ", ".join(difflib.get_close_matches(model, known)) or "ViT-B-32"
            raise UserError(f"clip_score: open_clip has no {model!r}; it has {similar} and others")
        return cls(model, pretrained, _sha256(pretrained))

    @property
    def id(self) -> str:
        """Of the model and its weights; scores of one id can be compared."""
        return f"open_clip-{self.model}-{self.sha256}"

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        """The cosine of an image and each caption, -1 to 1.

        Raises:
            UserError: the weights do not load, or the file is no longer the one that was hashed.
        """
        loaded = _load(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                image = loaded.model.encode_image(loaded.preprocess(picture)[None], normalize=True)[0]
                texts = [loaded.model.encode_text(loaded.tokenize([text]), normalize=True)[0] for text in captions]
                return [float(image @ text) for text in texts]
        finally:
            torch.set_num_threads(threads)


class _Loaded(NamedTuple):
    model: Any  # a module of open_clip, which has no types
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]


@cache
def _load(scorer: OpenClip) -> _Loaded:
    import open_clip

    if _sha256(scorer.pretrained) != scorer.sha256:
        raise UserError(f"{scorer.pretrained}: has changed since the run began; start it again")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(scorer.model, str(scorer.pretrained))
        return _Loaded(model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(scorer.model))
    except Exception as error:  # open_clip raises exceptions of many classes on a wrong file
        reason = one_line(error)[:MAX_REASON]
        raise UserError(f"open_clip cannot load {scorer.model} with weights {scorer.pretrained}: {reason}") from error


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: the weights of the CLIP score's model cannot be read ({error.strerror})") from error
