"""Small clips and sounds for tests."""

import io
import wave

import av
import numpy as np
from PIL import Image


def frames(seed: int, count: int = 5) -> list[Image.Image]:
    """Images of noise, 32 x 28 pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 28, 32, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def film(seed: int) -> bytes:
    """An MP4 file of five frames in one second, without sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 28, "yuv420p"
        for picture in frames(seed):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return out.getvalue()


def sound(seconds: float, seed: int = 0, channels: int = 1) -> bytes:
    """A WAV file of noise at 16 kHz."""
    samples = np.random.default_rng(seed).integers(-9000, 9000, int(16_000 * seconds) * channels, dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return out.getvalue()
