"""SSCD's network (arXiv 2202.10261): torchvision's ResNet-50 with GeM pooling and a linear layer.

Weights are those of the published file for torchvision (https://github.com/facebookresearch/sscd-copy-detection). A
TorchScript file is refused, since it is a program.
"""

import io
import zipfile

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet50
from torchvision.transforms import v2

from foundation.errors import UserError

DIM = 512
SHORT_SIDE = 288  # px
MAX_LONG_SIDE = 8 * SHORT_SIDE  # px; pictures with a higher aspect ratio are scaled to this long side
_PREFIX = "backbone."  # of every name in the file
_EXPECTED = "give sscd_disc_mixup.torchvision.pt, or its tensors under the same names as safetensors"


class GeMPool(nn.Module):
    """Generalised mean over the positions with power 3: [N, C, H, W] -> [N, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)


def load_sscd(data: bytes, name: str) -> nn.Module:
    """The network with the weights of a file.

    Args:
        data: of the file: a state dict as torch.save writes it, or safetensors.
        name: of the file, for errors.

    Raises:
        UserError: it is a TorchScript file, a file of another kind, or has other tensors.
    """
    tensors = _read_tensors(data, name)
    with torch.device("meta"):
        model = resnet50(weights=None, num_classes=DIM)
    model.avgpool = GeMPool()
    expected = {_PREFIX + key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: getattr(tensor, "shape", None) for key, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise UserError(f"{name}: {len(wrong)} tensors are missing or misshapen, {wrong[0]} first; {_EXPECTED}")
    state = {
        key.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def compute_descriptor(model: nn.Module, picture: Image.Image) -> np.ndarray:
    """SSCD's descriptor of an RGB picture, float32 [512], of unit length; one thread makes it deterministic."""
    pixels = v2.functional.to_dtype(v2.functional.to_image(_resize(picture)), torch.float32, scale=True)
    pixels = v2.functional.normalize(pixels, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return nn.functional.normalize(model(pixels[None]))[0].numpy()
    finally:
        torch.set_num_threads(threads)


def _resize(picture: Image.Image) -> Image.Image:
    """The picture in its aspect ratio, its short side SHORT_SIDE px, its long side at most MAX_LONG_SIDE px."""
    short, long = min(picture.size), max(picture.size)
    target, side = (SHORT_SIDE, short) if long * SHORT_SIDE <= short * MAX_LONG_SIDE else (MAX_LONG_SIDE, long)
    width, height = (max(1, length * target // side) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _read_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    if _is_torchscript(data):
        raise UserError(f"{name}: a TorchScript file is a program, which is not run; {_EXPECTED}")
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(data)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for bytes that are no pickle
        message = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{name}: holds no readable weights ({message}); {_EXPECTED}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{name}: holds no state dict; {_EXPECTED}")
    return tensors


def _is_torchscript(data: bytes) -> bool:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile:
        return False
    return any(name.endswith("/constants.pkl") for name in names)
