"""Sentences in synthetic voices, and sounds in which nothing is said -> shard records to transcribe.

There is a closed set of some 40 words, each sentence in every voice, and there are sentences of any text, each in one.

The voices are eSpeak NG's (package espeakng-loader) and flite's (its libraries in a folder); both are called as
libraries in the processes that use them.
"""

import ctypes
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.pipeline.workers import in_order
from data_prep.sources.recordings import SAMPLE_RATE, asked_freely, resampled, side_of, transcription_record
from foundation.errors import UserError
from foundation.extras import import_extra
from shards.format import Record, make_id
from shards.writer import write_shards

WORDS = (
    "apple",
    "bird",
    "blue",
    "boat",
    "book",
    "boy",
    "bread",
    "car",
    "cat",
    "chair",
    "cold",
    "cow",
    "dog",
    "door",
    "fish",
    "flower",
    "girl",
    "good",
    "green",
    "hand",
    "happy",
    "horse",
    "house",
    "little",
    "milk",
    "moon",
    "mother",
    "new",
    "old",
    "rain",
    "red",
    "river",
    "school",
    "snow",
    "star",
    "street",
    "sun",
    "table",
    "tree",
    "water",
    "white",
    "window",
)
MAX_WORDS = 5
ASKED_FREELY = 4  # each so many-th recording is asked about in words of one's own
CHUNK = 20  # sentences that one worker speaks at a time


@dataclass(frozen=True)
class Espeak:
    """A voice of eSpeak NG, e.g. "en-us" or "en-us+f3".

    Its pitch flutters on from one sentence to the next: the same sentence is not the same bytes twice.
    """

    voice: str = "en-us"

    def speak(self, text: str) -> np.ndarray:
        """int16 [T] at 16 kHz. UserError where the library or the voice is missing."""
        library, rate, pieces = _espeak()
        if library.espeak_SetVoiceByName(self.voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice {self.voice!r}")
        pieces.clear()
        data = text.encode() + b"\0"
        library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, 1, None, None)  # 1: the text is UTF-8
        library.espeak_Synchronize()
        return resampled(np.concatenate(pieces), rate)


@dataclass(frozen=True)
class Flite:
    """A voice of flite, "slt", "rms", "awb" or "kal16", from the libraries `libflite*.so.2.2` in a folder."""

    folder: Path
    voice: str = "slt"

    def speak(self, text: str) -> np.ndarray:
        """int16 [T] at 16 kHz. UserError where a library is missing."""
        library, voice = _flite(self.folder, self.voice)
        wave = library.flite_text_to_wave(text.encode(), voice)
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        rate = wave.contents.sample_rate
        library.delete_wave(wave)
        return resampled(samples, rate)


def sentences_of(number: int, seed: int = 0) -> list[str]:
    """So many different sentences of 1 to MAX_WORDS of the WORDS, each word alone among the first."""
    if number < len(WORDS):
        raise UserError(f"{number} sentences: at least {len(WORDS)} are needed, one for each word")
    found = dict.fromkeys(WORDS)
    rng = np.random.default_rng(seed)
    while len(found) < number:
        chosen = rng.choice(len(WORDS), int(rng.integers(2, MAX_WORDS + 1)), replace=False)
        found[" ".join(WORDS[i] for i in chosen)] = None
    return list(found)


def spoken_sentences(
    texts: Iterable[str], voices: Sequence[Espeak | Flite], number: int, seed: int = 0, workers: int = 1
) -> Iterator[Record]:
    """Yields so many sentences of texts, each in one of the voices; both are drawn with `seed`.

    A clause of a text is a sentence where it has 3 to 12 words of plain letters.

    Args:
        workers: processes that speak.

    Raises:
        UserError: there are fewer such sentences; a voice is missing.
    """
    clauses = (" ".join(part.split()) for text in texts for part in re.split(r"[;:()\"]", text))
    plain = re.compile(r"[A-Za-z'-]+(,? [A-Za-z'-]+){2,11}")
    sentences = sorted({clause for clause in clauses if plain.fullmatch(clause)})
    if len(sentences) < number:
        raise UserError(f"{number} sentences are asked for, and there are {len(sentences)} of 3 to 12 plain words")
    rng = np.random.default_rng(seed)
    drawn = [
        (sentences[place], voices[int(rng.integers(len(voices)))]) for place in rng.permutation(len(sentences))[:number]
    ]
    chunks = [drawn[start : start + CHUNK] for start in range(0, number, CHUNK)]
    for records in in_order(_said_by_one, chunks, workers):
        yield from records


def split_of_sentence(text: str) -> str:
    """Single words are for training, so that every word has been heard; else as `recordings.side_of`."""
    return side_of(text) if " " in text else "train"


def write_spoken_words(
    voices: Sequence[Espeak | Flite],
    output: str | Path,
    num_sentences: int = 3000,
    num_silences: int = 0,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> int:
    """Writes each sentence in each voice, and returns how many records there are; a sentence is in one split, and a
    quarter of the recordings is `asked_freely` about.

    Args:
        num_silences: sounds in which nothing is said, beside them: see `silence`.

    Raises:
        UserError: a voice is missing; too few sentences; the folder exists.
    """
    sentences = sentences_of(num_sentences, seed)
    chunks = [sentences[start : start + CHUNK] for start in range(0, len(sentences), CHUNK)]
    spoken = in_order(partial(_spoken, voices=tuple(voices)), chunks, workers)
    records = chain((record for records in spoken for record in records), silences(num_silences, seed))
    return write_shards(records, output, overwrite=overwrite)


def silence(rng: np.random.Generator) -> np.ndarray:
    """A sound in which nothing is said, int16 [T] at 16 kHz, 0.2 to 3 s: zeros, hiss, rumble, or the hum of mains.

    Its loudness is anything from one step of a sample to a tenth of full scale.
    """
    length = int(rng.integers(SAMPLE_RATE // 5, 3 * SAMPLE_RATE))
    loudness = 0.1 * 2.0 ** -rng.uniform(0, 12)
    match rng.integers(4):
        case 0:
            wave = np.zeros(length)
        case 1:
            wave = rng.standard_normal(length)
        case 2:
            wave = np.convolve(rng.standard_normal(length + 63), np.ones(64) / 8, "valid")
        case _:
            times = np.arange(length) / SAMPLE_RATE
            pitch = rng.choice((50, 60))
            wave = sum(np.sin(2 * np.pi * (pitch * n * times + rng.random())) / n for n in (1, 2, 3, 5))
    return (32767 * loudness * wave / 3).clip(-32768, 32767).round().astype(np.int16)


def silences(number: int, seed: int = 0) -> Iterator[Record]:
    """Yields so many records of a `silence` each, with an empty transcript."""
    for place in range(number):
        source = f"spoken-words/silence/{seed}/{place}"
        sound = silence(np.random.default_rng(int(make_id(source), 16)))
        yield transcription_record(source, side_of(source), "en", "", sound)


def _spoken(sentences: list[str], voices: tuple[Espeak | Flite, ...]) -> list[Record]:
    records = [_said(text, voice, split_of_sentence(text)) for text in sentences for voice in voices]
    return [asked_freely(record) if int(record.id, 16) % ASKED_FREELY == 0 else record for record in records]


def _said_by_one(drawn: list[tuple[str, Espeak | Flite]]) -> list[Record]:
    return [_said(text, voice, side_of(text)) for text, voice in drawn]


def _said(text: str, voice: Espeak | Flite, split: str) -> Record:
    source = f"spoken-words/{type(voice).__name__}/{voice.voice}/{make_id(text)}"
    return transcription_record(source, split, "en", text, voice.speak(text))


@cache
def _espeak() -> tuple[ctypes.CDLL, int, list[np.ndarray]]:
    """(library, its sample rate, where its sound goes): one for a process, since it has but one state."""
    loader = import_extra("espeakng_loader", "speech", "eSpeak NG")
    library, pieces = ctypes.CDLL(loader.get_library_path()), []
    # 2: sound is fetched, nothing played, calls return when it is done. The library appends "/espeak-ng-data".
    rate = library.espeak_Initialize(2, 0, str(Path(loader.get_data_path()).parent).encode(), 0x8000)
    if rate <= 0:
        raise UserError(f"eSpeak NG does not start with the data of {loader.get_data_path()}")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def take(samples, number, _):
        if samples and number > 0:
            pieces.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0

    library.espeak_SetSynthCallback(take)
    library.kept = take  # else it is freed while the library calls it
    return library, rate, pieces


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


@cache
def _flite(folder: Path, name: str) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """(library, voice). Libraries that are loaded already are found by those that need them."""
    paths = [Path(folder) / f"libflite{part}.so.2.2" for part in ("", "_usenglish", "_cmulex", f"_cmu_us_{name}")]
    try:
        library, *_, voices = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in paths]
    except OSError as error:
        raise UserError(f"{folder}: flite's voice {name!r} cannot be loaded ({error})") from None
    library.flite_init()
    register = getattr(voices, f"register_cmu_us_{name}")
    register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
    library.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
    library.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    library.delete_wave.argtypes = (ctypes.POINTER(_Wave),)
    return library, register(None)
