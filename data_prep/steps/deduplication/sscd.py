"""SSCD's network: torchvision's ResNet-50 with GeM pooling and a linear layer; its weights are read, nothing is run.

Of the published files (arXiv 2202.10261, https://github.com/facebookresearch/sscd-copy-detection) the one for
torchvision is read. A TorchScript file is a program, so it is refused.
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
MAX_LONG_SIDE = 8 * SHORT_SIDE  # of longer and thinner pictures the long side is brought to this
_PREFIX = "backbone."  # of every name in the file
_WANTED = "sscd_disc_mixup.torchvision.pt is wanted, or its tensors under the same names as safetensors"


class GeMPool(nn.Module):
    """Generalised mean over the positions, of power 3: [N, C, H, W] -> [N, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)


def load_sscd(data: bytes, name: str) -> nn.Module:
    """The network with the weights of a file.

    Args:
        data: the file: a state dict as torch.save writes it, or safetensors.
        name: of the file, for errors.

    Raises:
        UserError: a TorchScript file, a file of another kind, or with other tensors.
    """
    tensors = _read_tensors(data, name)
    with torch.device("meta"):
        model = resnet50(weights=None, num_classes=DIM)
    model.avgpool = GeMPool()
    wanted = {_PREFIX + key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: getattr(tensor, "shape", None) for key, tensor in tensors.items()}
    if found != wanted:
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise UserError(
            f"{name}: {len(wrong)} tensors are missing, of another shape or too many, {wrong[0]} first; {_WANTED}"
        )
    state = {
        key.removeprefix(_PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def describe(model: nn.Module, picture: Image.Image) -> np.ndarray:
    """SSCD's descriptor of an RGB picture, float32 [512], of unit length; on one thread, so always the same bits."""
    pixels = v2.functional.to_dtype(v2.functional.to_image(_resized(picture)), torch.float32, scale=True)
    pixels = v2.functional.normalize(pixels, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return nn.functional.normalize(model(pixels[None]))[0].numpy()
    finally:
        torch.set_num_threads(threads)


def _resized(picture: Image.Image) -> Image.Image:
    """The whole picture, its aspect kept: the short side is 288 pixels, unless the long side would pass its limit."""
    short, long = min(picture.size), max(picture.size)
    to, side = (SHORT_SIDE, short) if long * SHORT_SIDE <= short * MAX_LONG_SIDE else (MAX_LONG_SIDE, long)
    return picture.resize([max(1, length * to // side) for length in picture.size], Image.Resampling.BILINEAR)


def _read_tensors(data: bytes, name: str) -> dict[str, torch.Tensor]:
    if _is_torchscript(data):
        raise UserError(f"{name}: a TorchScript file is a program, which is not run; {_WANTED}")
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(data)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in any way
        said = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{name}: holds no readable weights ({said}); {_WANTED}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{name}: holds no state dict; {_WANTED}")
    return tensors


def _is_torchscript(data: bytes) -> bool:
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile:
        return False
    return any(name.endswith("/constants.pkl") for name in names)
