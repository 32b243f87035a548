"""The CLIP score's model: any open_clip checkpoint, and the cosine that open_clip itself gives."""

import json

import open_clip
import pytest
import torch
from PIL import Image

from app.clip_scorer import OpenClip
from foundation.errors import UserError

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model under open_clip's names, its file of random weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "tiny-scorer.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-scorer").state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def test_scores_are_open_clips_cosines(checkpoint, random_picture):
    captions = ["a dog on a wall", "two cats", "a dog on a wall"]
    picture = random_picture(50, 40)
    scores = OpenClip.of_file("tiny-scorer", checkpoint).score(picture, captions)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-scorer", str(checkpoint))
    with torch.inference_mode():
        images = model.eval().encode_image(torch.stack([preprocess(picture)] * 3))
        texts = model.encode_text(open_clip.get_tokenizer("tiny-scorer")(captions))
        expected = torch.nn.functional.cosine_similarity(images, texts)
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert scores[0] == scores[2] != scores[1] and abs(scores[0]) > 1e-3


def test_a_score_depends_on_its_own_image_and_caption_alone(checkpoint, random_picture):
    scorer, picture = OpenClip.of_file("tiny-scorer", checkpoint), random_picture(50, 40)
    both = scorer.score(picture, ["a dog on a wall", "two cats"])
    assert scorer.score(picture, ["two cats"]) == both[1:]
    assert scorer.score(Image.new("RGB", (3, 200)), ["two cats"]) != both[1:]


def test_an_unknown_model_names_similar_ones(checkpoint):
    with pytest.raises(UserError, match="open_clip has no 'ViT-B32'; it has ViT-B-32"):
        OpenClip.of_file("ViT-B32", checkpoint)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt"):
        OpenClip.of_file("tiny-scorer", tmp_path / "absent.pt")


def test_broken_and_changed_weights_are_refused(checkpoint, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    scorer = OpenClip.of_file("tiny-scorer", tmp_path / "broken.pt")
    with pytest.raises(UserError, match=r"cannot load tiny-scorer with weights .*broken\.pt"):
        scorer.score(Image.new("RGB", (9, 9)), ["a"])
    (tmp_path / "broken.pt").write_bytes(b"other weights")
    with pytest.raises(UserError, match="has changed since"):
        scorer.score(Image.new("RGB", (9, 9)), ["a"])
