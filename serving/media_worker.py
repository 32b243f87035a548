"""The child process that decodes files of strangers: `python -m serving.media_worker`, with commands on stdin.

It has no keys and no model. After its imports it limits its own memory, open files and file sizes. A command and an
answer are each a JSON header and bytes (`serving.media`), never pickles: what a hostile file may have taken over can
send wrong pixels, not code.
"""

import contextlib
import importlib
import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

from PIL import Image

from foundation.errors import UserError, one_line

# Everything that decoding needs, imported before the limits are set.
MODULES = (
    *("serving.grammar", "speech.reading", "video.sampling", "vision.reading"),
    *("av", "av.stream", "cv2", "decord", "llguidance", "soundfile", "torchaudio.functional"),
)
CLIP_PICTURES = 4  # the sampled frames of a clip have at most so many times the pixels of a picture
LENGTHS = struct.Struct("<IQ")  # bytes of the header and of the payload


def write_message(stream: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Send a message."""
    text = json.dumps(header).encode()
    stream.write(LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def read_message(stream: BinaryIO, max_bytes: int) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end of the stream.

    Raises:
        ValueError: it is longer than `max_bytes`.
    """
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    header_size, payload_size = LENGTHS.unpack(lengths)
    if header_size + payload_size > max_bytes:
        raise ValueError(f"a message of {header_size + payload_size:,} bytes")
    header, payload = stream.read(header_size), stream.read(payload_size)
    return (json.loads(header), payload) if len(payload) == payload_size else None


def decode(command: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Decode one file.

    Args:
        command: kind ("image", "audio", "video" or "schema"), pixels and seconds (limits), frames, side (shrink a
            picture to it; 0: not).

    Raises:
        UserError: it cannot be read.
    """
    import numpy as np

    kind = command["kind"]
    if kind == "image":
        from vision.reading import read_picture

        picture = read_picture(data, max_pixels=command["pixels"])
        if command["side"]:
            picture.thumbnail((command["side"], command["side"]))
        pixels = np.asarray(picture)
        return {"shape": pixels.shape}, pixels.tobytes()
    if kind == "audio":
        from speech.reading import read_sound

        sound = read_sound(data, max_seconds=command["seconds"]).numpy()
        return {"shape": sound.shape}, sound.tobytes()
    if kind == "video":
        from video.sampling import sample_frames

        limit = min(command["pixels"], CLIP_PICTURES * command["pixels"] // command["frames"])  # of a frame
        frames = sample_frames(data, command["frames"], max_pixels=limit, max_seconds=command["seconds"])
        header = {"shape": frames.pixels.shape, "times": frames.times.tolist(), "duration": frames.duration}
        return header, np.ascontiguousarray(frames.pixels).tobytes()
    from serving.grammar import check_schema

    check_schema(data.decode())
    return {}, b""


def main() -> None:
    """Serve commands until stdin ends. The first command names the limit of memory."""
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    for module in MODULES:
        with contextlib.suppress(ImportError):  # of an extra that is not installed: its files are refused by name
            importlib.import_module(module)
    Image.init()

    first = read_message(commands, 2**20)
    assert first is not None
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    memory = used + first[0]["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    write_message(answers, {"ready": True})
    while (message := read_message(commands, 2**40)) is not None:
        try:
            header, payload = decode(*message)
        except UserError as error:
            header, payload = {"error": one_line(error)}, b""
        except MemoryError:
            header, payload = {"error": "it takes more memory to decode than the server allows"}, b""
        except Exception as error:  # decoders raise many kinds on hostile files
            header, payload = {"error": f"it cannot be decoded ({type(error).__name__}: {one_line(error)[:200]})"}, b""
        write_message(answers, header, payload)


if __name__ == "__main__":
    main()
