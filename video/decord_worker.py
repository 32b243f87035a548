"""The process in which decord runs; `decord_reader.py` starts it as a script: `decord_worker.py SOCKET`.

decord can hang in C code, and only ending its process stops that. A request is one message that names frames of one
file, with a file descriptor of the memory to write them to (and one of the file's bytes if it has no path). The answer
is "done" or the error. The script runs without our packages on its path, so it imports none of them.
"""

import json
import mmap
import os
import socket
import sys

# decord reads these when it is imported: the number of retries at the end of a file, where no frames are left
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "1024")
os.environ.setdefault("DECORD_REWIND_RETRY_MAX", "4")

import decord
import numpy as np


def decode(request: dict, memory: mmap.mmap, path: str) -> None:
    """Write the frames `indices` of a request to `memory`, seeking to a key frame first where `keys` names one."""
    reader = decord.VideoReader(path, num_threads=1)
    try:
        if len(reader) != request["frames"]:
            raise ValueError(f"decord counts {len(reader)} frames, not {request['frames']}")
        pixels = np.frombuffer(memory, np.uint8).reshape(len(request["indices"]), *request["shape"])
        position = 0
        plan = zip(request["indices"], request["keys"], request["starts"], strict=True)
        for row, (index, key, keys_on_the_way) in enumerate(plan):
            # decord seeks to a key frame wherever one lies ahead; reading up to each of them avoids that.
            if key is None:
                for boundary in keys_on_the_way:
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
        reader.seek(0)  # else frames that are decoded ahead are never freed
        del reader


def main() -> None:
    """Answer requests until the socket closes."""
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
