"""How well captions fit their pictures, by any open_clip model: the scorer that the curation's CLIP score goes by."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from foundation.errors import UserError


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model, one picture or caption at a time, on one thread.

    Attributes:
        model: as open_clip knows it, such as ViT-B-32.
        pretrained: file of its weights.
        sha256: of that file.
    """

    model: str
    pretrained: Path
    sha256: str

    @classmethod
    def of_file(cls, model: str, pretrained: Path) -> "OpenClip":
        """Raises UserError for a name that open_clip does not know, or a file that is not there."""
        import open_clip

        known = open_clip.list_models()
        if model not in known:
            near = ", ".join(difflib.get_close_matches(model, known)) or "ViT-B-32"
            raise UserError(f"clip_score: open_clip has no {model!r}; it has {near} and others")
        return cls(model, pretrained, _digest(pretrained))

    @property
    def id(self) -> str:
        return f"open_clip-{self.model}-{self.sha256}"

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        """See data_prep.steps.clip_score.PairScorer."""
        model, preprocess, tokenize = _load(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                seen = model.encode_image(preprocess(picture)[None], normalize=True)[0]
                said = [model.encode_text(tokenize([caption]), normalize=True)[0] for caption in captions]
                return [float(seen @ text) for text in said]
        finally:
            torch.set_num_threads(threads)


@cache
def _load(scorer: OpenClip):
    """(model, preprocessing of a picture, tokenizer)."""
    import open_clip

    if _digest(scorer.pretrained) != scorer.sha256:
        raise UserError(f"{scorer.pretrained}: has changed since the run began; start it again")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(scorer.model, str(scorer.pretrained))
        return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(scorer.model)
    except Exception as error:  # open_clip raises many kinds here
        said = " ".join(str(error).split())[:300]
        raise UserError(f"open_clip cannot load {scorer.model} with weights {scorer.pretrained}: {said}") from None


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: the weights of the CLIP score's model cannot be read ({error.strerror})") from None
