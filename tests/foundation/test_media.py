"""Films and sounds are opened by name of their containers; a playlist opens nothing, neither a file nor an address."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest

from foundation.errors import UserError
from foundation.media import FILM_FORMATS, SOUND_FORMATS, open_media
from speech.reading import read_sound
from video.motion_vectors import codec_speed
from video.sampling import sample_frames

READERS = {
    "open_media": lambda path: open_media(path.open("rb"), "video"),
    "sound": read_sound,
    "film": sample_frames,
    "film in memory": lambda path: sample_frames(path.read_bytes()),
    "motion": lambda path: codec_speed(path.read_bytes()),
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a local server, and the list of what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def playlists(base: str) -> dict[str, str]:
    """Lists of media in the forms that FFmpeg recognises, whose one entry is below `base`."""
    head = "#EXTM3U\n#EXT-X-VERSION:3\n"
    return {
        "segments.m3u8": f"{head}#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{base}/a.ts\n#EXT-X-ENDLIST\n",
        "variants.m3u8": f"{head}#EXT-X-STREAM-INF:BANDWIDTH=1280000\n{base}/a.m3u8\n",
        "segments.mp4": f"{head}#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{base}/a.mp3\n#EXT-X-ENDLIST\n",
        "list.wav": f"ffconcat version 1.0\nfile {base}/a.wav\n",
        "session.sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\na=control:{base}/a\nm=audio 5004 RTP/AVP 0\n",
    }


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", playlists(""))
def test_a_playlist_is_refused_and_its_address_is_not_asked(tmp_path: Path, server, reader: str, name: str):
    base, asked = server
    asked.clear()
    path = tmp_path / name
    path.write_text(playlists(base)[name])
    with pytest.raises(UserError, match="playlists are not followed"):
        READERS[reader](path)
    assert asked == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", playlists(""))
def test_a_playlist_of_local_files_is_refused(tmp_path: Path, reader: str, name: str):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(container.add_stream("pcm_s16le", rate=16000, layout="mono").encode(frame))
    path = tmp_path / name
    path.write_text(playlists(str(tmp_path))[name])
    with pytest.raises(UserError, match="playlists are not followed"):
        READERS[reader](path)


def test_the_server_would_be_asked_without_the_list_of_formats(tmp_path: Path, server):
    base, asked = server
    path = tmp_path / "segments.m3u8"
    path.write_text(playlists(base)["segments.m3u8"])
    with pytest.raises(av.error.FFmpegError), path.open("rb") as file:
        av.open(file)
    assert asked
    asked.clear()


def test_the_names_of_the_formats_are_names_of_ffmpeg():
    known = {name for names in av.formats_available for name in names.split(",")}
    assert set(f"{FILM_FORMATS},{SOUND_FORMATS}".split(",")) <= known


def test_tags_in_another_encoding_do_not_stop_a_file():
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        container.metadata["title"] = "Caf\u00e9"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 32, 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())
    latin = out.getvalue().replace("Caf\u00e9".encode(), "Caf\u00e9 ".encode("latin-1"))
    with pytest.raises(UnicodeDecodeError):
        av.open(io.BytesIO(latin))
    with open_media(io.BytesIO(latin), "video") as container:
        assert container.metadata["title"].startswith("Caf")
