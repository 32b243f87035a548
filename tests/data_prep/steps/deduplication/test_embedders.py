import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageEnhance
from torchvision import transforms
from torchvision.models import resnet50

import data_prep.steps.deduplication.sscd
from data_prep.steps.deduplication.embedders import SSCD, LowFrequencies
from data_prep.steps.deduplication.sscd import compute_descriptor, load_sscd
from foundation.errors import UserError
from vision.reading import read_picture


@pytest.fixture(scope="module")
def weights():
    """Random weights under the names of the published file."""
    torch.manual_seed(0)
    return {f"backbone.{name}": tensor for name, tensor in resnet50(num_classes=512).state_dict().items()}


def saved(tensors) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out)
    return out.getvalue()


def test_low_frequencies_find_edited_copies_and_no_other_pictures(noise, encode):
    embedder, pictures = LowFrequencies(), [noise(seed, (200, 160)) for seed in range(20)]
    vectors = np.stack([embedder.embed(picture) for picture in pictures])
    assert vectors.dtype == np.float32 and vectors.shape == (20, embedder.dim)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)  # rounding to float32
    others = (vectors @ vectors.T)[np.triu_indices(20, 1)]
    assert others.max() < embedder.floor
    for edit in (
        lambda picture: read_picture(encode(picture, "JPEG")),
        lambda picture: picture.resize((97, 81)),
        lambda picture: picture.crop((3, 3, 197, 157)),
        lambda picture: ImageEnhance.Brightness(picture).enhance(0.9),
    ):
        copies = np.stack([embedder.embed(edit(picture)) for picture in pictures])
        assert (copies * vectors).sum(1).min() > embedder.threshold
    assert np.array_equal(embedder.embed(pictures[3]), vectors[3])
    assert np.isfinite(embedder.embed(Image.new("RGB", (5, 5), (128, 128, 128)))).all()


def test_low_frequencies_are_coefficients_of_a_dct():
    """A picture of one cosine has one large value, at that frequency."""
    wave = np.cos(np.pi * (2 * np.arange(64) + 1) * 2 / 128)
    grey = np.tile((128 + 100 * wave)[None], (64, 1)).astype(np.uint8)
    values = LowFrequencies().embed(Image.fromarray(grey).convert("RGB"))
    lowest = [(0, 1), (1, 0), (0, 2)]  # by their sum, then vertical first
    assert np.abs(values).argmax() == lowest.index((0, 2)) and values[2] > 0.9


@pytest.mark.parametrize("size", [(400, 300), (90, 200)])
def test_sscd_equals_the_published_network(weights, noise, size):
    """As published: ResNet-50, GeM pooling of power 3, a linear layer, L2 normalisation; Resize(288)."""
    network = resnet50(num_classes=512)
    network.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in weights.items()})
    network.avgpool, network.fc = torch.nn.Identity(), torch.nn.Identity()
    prepare = transforms.Compose(
        [
            transforms.Resize(288),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    picture = noise(1, size)
    prepared = prepare(picture)[None]
    with torch.inference_mode():
        positions = network.eval()(prepared).reshape(2048, -1).double()
    pooled = (positions.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)
    expected = weights["backbone.fc.weight"].double() @ pooled + weights["backbone.fc.bias"].double()
    described = compute_descriptor(load_sscd(saved(weights), "sscd.pt"), picture)
    assert described.dtype == np.float32 and described.shape == (512,)
    # the expected pooling and linear layer are in double precision
    assert np.abs(described - (expected / expected.norm()).numpy()).max() < 1e-5


def test_sscd_is_loaded_from_a_file_that_may_not_change(weights, noise, tmp_path, monkeypatch):
    path = tmp_path / "sscd.safetensors"
    path.write_bytes(safetensors.torch.save(weights))
    embedder = SSCD.of_file(path)
    assert embedder.id.startswith("sscd_disc_mixup-") and len(embedder.sha256) == 64
    vector = embedder.embed(noise(1, (30, 30)))
    assert np.array_equal(vector, compute_descriptor(load_sscd(saved(weights), "sscd.pt"), noise(1, (30, 30))))
    assert abs(np.linalg.norm(vector) - 1) < 1e-6
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="changed since the run began"):
        SSCD(path, "0" * 64).embed(noise(1))


def test_the_long_side_of_thin_pictures_is_limited():
    for size, resized in (
        ((4, 4000), (2, 2304)),
        ((49, 49), (288, 288)),
        ((300, 200), (432, 288)),
        ((2304, 1), (2304, 1)),
    ):
        assert data_prep.steps.deduplication.sscd._resize(Image.new("RGB", size)).size == resized


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_files_without_these_weights_are_refused(weights, tmp_path):
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    missing = {name: tensor for name, tensor in weights.items() if name != "backbone.fc.bias"}
    for data, words in (
        (script.getvalue(), "TorchScript .*sscd_disc_mixup.torchvision.pt"),
        (saved(missing), r"1 tensors .* backbone.fc.bias first"),
        (saved({**weights, "backbone.fc.bias": torch.zeros(3)}), r"1 tensors .* backbone.fc.bias first"),
        (saved([1, 2]), "no state dict"),
        (saved(Path("x")), "no readable weights"),  # an object that is no tensor is not unpickled
        (b"not weights", "no readable weights"),
        (b"", "no readable weights"),
        (b"a dog in front of an old wall", "no readable weights"),
    ):
        with pytest.raises(UserError, match=rf"sscd\.pt: .*{words}"):
            load_sscd(data, "sscd.pt")
    with pytest.raises(UserError, match="cannot be read"):
        SSCD.of_file(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="no readable weights"):
        load_sscd(b"junk", "sscd.safetensors")
