"""Sentences in synthetic voices, and recordings without speech -> shard records to transcribe.

There are two kinds of sentences: those of a closed set of some 40 words, each spoken in every voice, and those of any
text, each spoken in one voice.

The voices are those of eSpeak NG (package espeakng-loader) and flite (its libraries in a folder), which are loaded as
libraries into this process and its workers.
"""

import ctypes
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.pipeline.workers import map_in_order
from data_prep.sources.recordings import (
    resample_to_16_khz,
    split_of_sentence,
    transcription_record,
    with_free_form_question,
)
from data_prep.synthetic.topics import split_names
from foundation.errors import UserError
from foundation.extras import import_extra
from shards.format import Record, make_id
from shards.writer import write_shards
from speech.features import SAMPLE_RATE

WORDS = split_names(
    "apple bird blue boat book boy bread car cat chair cold cow dog door fish flower girl good green hand "
    "happy horse house little milk moon mother new old rain red river school snow star street sun table tree "
    "water white window"
)
MAX_WORDS = 5
FREE_FORM_INTERVAL = 4  # one in so many recordings, chosen by id, gets a free-form question
CHUNK = 20  # sentences that a worker gets at a time


@dataclass(frozen=True)
class Espeak:
    """A voice of eSpeak NG, e.g. "en-us" or "en-us+f3".

    The library adds a random flutter to the pitch, so the same sentence gives different bytes each time.
    """

    voice: str = "en-us"

    def speak(self, text: str) -> np.ndarray:
        """The spoken text, int16 [T] at 16 kHz.

        Raises:
            UserError: the library or the voice is missing.
        """
        library, rate, pieces = _espeak()
        if library.espeak_SetVoiceByName(self.voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice {self.voice!r}")
        pieces.clear()
        data = text.encode() + b"\0"
        library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, 1, None, None)  # 1: the text is UTF-8
        library.espeak_Synchronize()
        return resample_to_16_khz(np.concatenate(pieces), rate)


@dataclass(frozen=True)
class Flite:
    """A voice of flite, "slt", "rms", "awb" or "kal16", from the libraries `libflite*.so.2.2` in a folder."""

    folder: Path
    voice: str = "slt"

    def speak(self, text: str) -> np.ndarray:
        """The spoken text, int16 [T] at 16 kHz.

        Raises:
            UserError: a library is missing.
        """
        library, voice = _flite(self.folder, self.voice)
        wave = library.flite_text_to_wave(text.encode(), voice)
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        rate = wave.contents.sample_rate
        library.delete_wave(wave)
        return resample_to_16_khz(samples, rate)


Voice = Espeak | Flite


def random_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different sentences of 1 to MAX_WORDS of the WORDS; the first ones are the single words.

    Raises:
        UserError: `count` is smaller than the number of words.
    """
    if count < len(WORDS):
        raise UserError(f"{count} sentences: at least {len(WORDS)} are needed, one for each word")
    sentences = dict.fromkeys(WORDS)
    rng = np.random.default_rng(seed)
    while len(sentences) < count:
        chosen = rng.choice(len(WORDS), int(rng.integers(2, MAX_WORDS + 1)), replace=False)
        sentences[" ".join(WORDS[i] for i in chosen)] = None
    return list(sentences)


def spoken_sentences(
    texts: Iterable[str], voices: Sequence[Voice], count: int, seed: int = 0, workers: int = 1
) -> Iterator[Record]:
    """Yields records of random sentences of texts, each in a random voice.

    A sentence is a clause of 3 to 12 words of letters, apostrophes and hyphens.

    Args:
        texts: are divided into clauses.
        voices: to draw from.
        count: of sentences.
        seed: of the choice of sentences and voices.
        workers: processes that speak.

    Raises:
        UserError: the texts have fewer sentences; a voice is missing.
    """
    clauses = (" ".join(part.split()) for text in texts for part in re.split(r"[;:()\"]", text))
    plain = re.compile(r"[A-Za-z'-]+(,? [A-Za-z'-]+){2,11}")
    sentences = sorted({clause for clause in clauses if plain.fullmatch(clause)})
    if len(sentences) < count:
        raise UserError(f"{count} sentences are needed; the texts have {len(sentences)} of 3 to 12 plain words")
    rng = np.random.default_rng(seed)
    drawn = [
        (sentences[index], voices[int(rng.integers(len(voices)))]) for index in rng.permutation(len(sentences))[:count]
    ]
    chunks = [drawn[start : start + CHUNK] for start in range(0, count, CHUNK)]
    for records in map_in_order(_speak_each_once, chunks, workers):
        yield from records


def split_of_spoken_words(text: str) -> str:
    """The split of a sentence of WORDS; single words are for training, so that every word is trained on."""
    return split_of_sentence(text) if " " in text else "train"


def write_spoken_words(
    voices: Sequence[Voice],
    output: str | Path,
    num_sentences: int = 3000,
    num_silences: int = 0,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> int:
    """Write shards with each sentence of the closed set in each voice, and return the number of records.

    A sentence is in one split, whoever speaks it. A quarter of the recordings have a free-form question.

    Args:
        voices: that speak.
        output: folder of shards to write.
        num_sentences: at least one for each word.
        num_silences: recordings without speech (see `silence`) to add.
        seed: of all random choices.
        workers: processes that speak.
        overwrite: replace the folder if it exists.

    Raises:
        UserError: a voice is missing; too few sentences; the folder exists.
    """
    sentences = random_sentences(num_sentences, seed)
    chunks = [sentences[start : start + CHUNK] for start in range(0, len(sentences), CHUNK)]
    spoken = map_in_order(partial(_speak_in_each_voice, voices=tuple(voices)), chunks, workers)
    records = chain((record for records in spoken for record in records), silences(num_silences, seed))
    return write_shards(records, output, overwrite=overwrite)


def silence(rng: np.random.Generator) -> np.ndarray:
    """A recording without speech, int16 [T] at 16 kHz, 0.2 to 3 s: zeros, white noise, rumble, or mains hum.

    Its loudness is log-uniform over twelve octaves, up to a tenth of full scale.
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


def silences(count: int, seed: int = 0) -> Iterator[Record]:
    """Yields records of recordings without speech (see `silence`), with an empty transcript."""
    for index in range(count):
        source = f"spoken-words/silence/{seed}/{index}"
        sound = silence(np.random.default_rng(int(make_id(source), 16)))
        yield transcription_record(source, split_of_sentence(source), "en", "", sound)


def _speak_in_each_voice(sentences: list[str], voices: tuple[Voice, ...]) -> list[Record]:
    records = [_speak(text, voice, split_of_spoken_words(text)) for text in sentences for voice in voices]
    return [
        with_free_form_question(record) if int(record.id, 16) % FREE_FORM_INTERVAL == 0 else record
        for record in records
    ]


def _speak_each_once(drawn: list[tuple[str, Voice]]) -> list[Record]:
    return [_speak(text, voice, split_of_sentence(text)) for text, voice in drawn]


def _speak(text: str, voice: Voice, split: str) -> Record:
    source = f"spoken-words/{type(voice).__name__}/{voice.voice}/{make_id(text)}"
    return transcription_record(source, split, "en", text, voice.speak(text))


@cache
def _espeak() -> tuple[ctypes.CDLL, int, list[np.ndarray]]:
    """(library, its sample rate, the list that receives its sound), once per process: the library has global state."""
    loader = import_extra("espeakng_loader", "speech", "eSpeak NG")
    library = ctypes.CDLL(loader.get_library_path())
    pieces: list[np.ndarray] = []
    # 2: calls return when all sound has been retrieved; nothing is played. The library appends "/espeak-ng-data".
    rate = library.espeak_Initialize(2, 0, str(Path(loader.get_data_path()).parent).encode(), 0x8000)
    if rate <= 0:
        raise UserError(f"eSpeak NG cannot be started with the data in {loader.get_data_path()}")

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples: Any, num_samples: int, _: Any) -> int:
        if samples and num_samples > 0:
            pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    library.callback = receive  # type: ignore[attr-defined]  # keeps a reference: the library calls it later
    return library, rate, pieces


class _Wave(ctypes.Structure):
    """flite's cst_wave."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


@cache
def _flite(folder: Path, name: str) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """(library, voice). RTLD_GLOBAL lets the later libraries use the symbols of the earlier ones."""
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
