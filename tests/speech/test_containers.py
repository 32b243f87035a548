"""Joined files are found, and missing bytes counted, by the sizes that containers state."""

import io
import struct

import numpy as np
import pytest

from foundation.errors import UserError
from speech.containers import SLACK, Data, Part, parts
from tests.speech.sound_files import KINDS, encoded, sound_file, tone

SPLIT = [name for name, kind in KINDS.items() if not kind.stream]


def parts_of(data: bytes) -> list[Part]:
    return parts(Data(io.BytesIO(data)))


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    """A second of noise in each kind of file."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100)
    return {name: encoded(noise, kind.rates[-1], kind) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_is_one_part_with_nothing_missing(sounds, name):
    (part,) = parts_of(sounds[name])
    assert (part.start, part.end, part.missing) == (0, len(sounds[name]), 0)


@pytest.mark.parametrize("name", SPLIT)
def test_joined_files_are_cut_where_they_were_joined(sounds, name):
    data = sounds[name]
    joined = parts_of(data * 3)
    assert [(part.start, part.end, part.missing) for part in joined] == [
        (n * len(data), (n + 1) * len(data), 0) for n in range(3)
    ]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.sized and name not in ("flac", "tta")])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_bytes_beyond_the_end_are_missing(sounds, name, share):
    data = sounds[name]
    cut = data[: int(share * len(data))]
    (part,) = parts_of(cut)
    if name.startswith(("ogg", "m")):  # up to the end of the page or box, or of the last frame before the tags
        assert 0 < part.missing <= len(data) - len(cut)
    else:
        assert part.missing == len(data) - len(cut)
    *_, part = parts_of(data + cut if not KINDS[name].stream else cut)
    assert part.missing


@pytest.mark.parametrize("name", ["wav", "rf64", "w64", "caf", "aiff", "au"])
def test_a_few_bytes_are_not_missed(sounds, name):
    data = sounds[name]
    assert parts_of(data[: len(data) - SLACK])[0].missing == 0
    assert parts_of(data[: len(data) - SLACK - 1])[0].missing == SLACK + 1


@pytest.mark.parametrize("name", ["aac", "mp3 cbr, no Xing", "ac3", "mpeg-ts aac", "aac in latm"])
def test_nothing_is_missing_from_raw_streams(sounds, name):
    data = sounds[name]
    assert parts_of(data[: len(data) // 2]) == [Part(0, len(data) // 2)]


def test_what_follows_a_wav_file_belongs_to_it():
    data = sound_file(tone(16_000))
    for tail in (b"LIST\x04\0\0\0abcd", b"\0" * 700, b"TAG" + bytes(125), b"RIFF"):
        assert parts_of(data + tail) == [Part(0, len(data) + len(tail))]


def test_a_wav_file_without_its_pad_byte_is_cut_from_the_next():
    data = sound_file(tone(16_000)[:301], subtype="PCM_U8")
    data = data[: data.index(b"data") + 8 + 301]
    assert [part.start for part in parts_of(data + data)] == [0, len(data)]
    assert [part.start for part in parts_of(data + b"\0" + data)] == [0, len(data) + 1]


def test_the_continuing_chunks_of_a_long_avi_film_are_no_file_of_their_own(sounds):
    avi = sounds["avi"]
    more = b"RIFF" + struct.pack("<I", 104) + b"AVIX" + bytes(100)
    assert parts_of(avi + more) == [Part(0, len(avi) + len(more))]
    assert [part.end for part in parts_of(avi + more + avi)] == [len(avi + more), len(avi + more + avi)]


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("name", ["wav", "avi"])
def test_files_that_were_never_closed_reach_to_the_end(sounds, name, size):
    data = bytearray(sounds[name])
    data[4:8] = struct.pack("<I", size)
    if name == "wav":
        at = data.index(b"data") + 4
        data[at : at + 4] = struct.pack("<I", size)
    assert parts_of(bytes(data)) == [Part(0, len(data))]


def test_an_empty_wav_file_with_tags_is_no_unfinished_one():
    """FFmpeg would play the tags."""
    data = sound_file(np.zeros(0)) + b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf58.29.100\0"
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    with pytest.raises(UserError, match="holds no samples"):
        parts_of(data)


def test_joined_flac_files_without_tags_are_cut(sounds):
    data = sounds["flac"]
    bare = data[:4] + b"\x80" + data[5:42] + data[data.index(b"\xff\xf8", 42) :]
    assert [part.start for part in parts_of(bare + bare + data)] == [0, len(bare), 2 * len(bare)]
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data
    assert [part.start for part in parts_of(tagged + data)] == [0, len(tagged)]


def test_an_ogg_file_that_was_cut_before_another_was_joined(sounds):
    ogg = sounds["ogg vorbis"]
    first, second = parts_of(ogg[: len(ogg) * 2 // 3] + ogg)
    assert first.end == len(ogg) * 2 // 3 and first.missing
    assert second.end - second.start == len(ogg) and not second.missing


def test_a_matroska_file_of_unknown_size_has_nothing_missing(sounds):
    data = bytearray(sounds["matroska flac"])
    at = data.index(b"\x18\x53\x80\x67") + 4
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    assert parts_of(bytes(data[: len(data) // 2])) == [Part(0, len(data) // 2)]


@pytest.mark.parametrize(
    "data", [b"R", b"RIFF", b"OggS", b"ID3\x04\0\0\x7f\x7f\x7f\x7f", b"\x1a\x45\xdf\xa3", b"caff\0\x01"]
)
def test_files_that_end_in_their_first_bytes_are_parts(data):
    (part,) = parts_of(data)
    assert (part.start, part.end) == (0, len(data))
