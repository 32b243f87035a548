"""The process that decord runs in, started by `decord_reader.py` as a script: `decord_worker.py SOCKET`.

decord can spin for ever inside C code, which only the end of its process ends. One message asks for the frames of one
file and carries a descriptor of memory to put them into (and one of the file's bytes where it has no path); the answer
is an empty message, or the reason why not.
"""

import json
import mmap
import os
import socket
import sys

# decord reads these when its library loads: how often it tries again at the end of a file, where it has no more frames
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "1024")
os.environ.setdefault("DECORD_REWIND_RETRY_MAX", "4")

import decord
import numpy as np


def decode(request: dict, memory: mmap.mmap, path: str) -> None:
    """Fills the memory with the frames `indices`, seeking to a key frame first where `keys` names one."""
    reader = decord.VideoReader(path, num_threads=1)
    try:
        if len(reader) != request["frames"]:
            raise ValueError(f"decord counts {len(reader)} frames, not {request['frames']}")
        pixels = np.frombuffer(memory, np.uint8).reshape(len(request["indices"]), *request["shape"])
        position = 0
        for row, (index, key, start) in enumerate(
            zip(request["indices"], request["keys"], request["starts"], strict=True)
        ):
            # decord's own seek goes by way of a key frame wherever one lies ahead; stepping over it avoids that
            if key is None:
                for boundary in start:
                    if boundary > position:
                        reader.seek_accurate(boundary - 1)
                        reader.next()
            reader.seek_accurate(index)
            frame = reader.next().asnumpy()
            if frame.shape != tuple(request["shape"]):
                raise ValueError(f"decord gives a frame of shape {frame.shape}, not {request['shape']}")
            pixels[row] = frame
            position = index + 1
        del pixels
    finally:
        reader.seek(0)  # released while it runs ahead, it never gives back the frames that are waiting
        del reader


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 2**20, 2)
        if not message:
            return
        request = json.loads(message)
        try:
            with mmap.mmap(descriptors[0], 0) as memory:
                decode(request, memory, request["path"] or f"/proc/self/fd/{descriptors[1]}")
            answer = b"done"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".encode()[:2000]
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(answer)


if __name__ == "__main__":
    main()
