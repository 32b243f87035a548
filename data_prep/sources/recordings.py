"""Transcribed recordings -> shard records for transcription, 16 kHz mono FLAC.

Sets: the prompts of the Asterisk telephone system, Tux Paint's spoken descriptions, and two small sets that are held
out whole. A sentence of a set is in one split, whoever speaks it.
"""

import gzip
import io
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_prep.sources import tuxpaint
from data_prep.sources.files import Dropped
from data_prep.sources.splits import join_concepts, split_of
from foundation.errors import UserError
from foundation.extras import MissingExtraError, import_extra
from shards.format import Record, make_id
from speech.features import SAMPLE_RATE
from speech.prompts import TRANSCRIBE
from speech.reading import read_sound, resample

QUESTIONS = ("What did they say?", "What is said here?", "Write down what you hear.", "What do you hear?")
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.08  # of the sentences
LANGUAGES = {
    "bg": "Bulgarian",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
}
ASTERISK_LANGUAGES = ("en", "es", "fr", "it", "ru")
STAMP_LANGUAGES = ("bg", "es", "fr", "ro", "ru")  # the languages of tuxpaint-stamps-default with most recordings
_MFA_LANGUAGES = {"13697_": "es", "common_voice_ja": "ja", "se10x016": "sv"}  # by prefix of the file; else English


def transcription_record(source: str, split: str, language: str, text: str, samples: np.ndarray) -> Record:
    """A record with the task "transcription", or "silence" where the text is empty.

    Args:
        source: unique name of the recording; the id follows from it.
        split: of the record.
        language: a key of LANGUAGES.
        text: the transcript.
        samples: int16 [T] at 16 kHz.
    """
    request = f"{TRANSCRIBE} {LANGUAGES[language]}:"
    return _speech_record(source, split, "transcription" if text else "silence", language, request, text, samples)


def with_free_form_question(record: Record) -> Record:
    """A transcription record with one of QUESTIONS after the sound in place of the fixed prompt before it.

    A model that is trained with one wording alone does not answer others (the paper has one wording). The record's id
    decides the question.
    """
    sound = record.json["messages"][0]["content"][1]
    question = QUESTIONS[int(record.id, 16) // 8 % len(QUESTIONS)]  # the lowest bits may have chosen the record
    request = {"role": "user", "content": [sound, {"type": "text", "text": question}]}
    return replace(record, json={**record.json, "messages": [request, *record.json["messages"][1:]]})


def translation_record(source: str, split: str, language: str, text: str, samples: np.ndarray, said: str) -> Record:
    """A record that asks for a translation of the spoken sentence (paper §8.2.2).

    Args:
        source, split, samples: see `transcription_record`.
        language, text: of the translation.
        said: the spoken sentence, which is stored under the same name.
    """
    request = f"Translate the following sentence into {LANGUAGES[language]}:"
    record = _speech_record(source, split, "translation", language, request, text, samples)
    record.json["said"] = said
    return record


def _speech_record(
    source: str, split: str, task: str, language: str, request: str, text: str, samples: np.ndarray
) -> Record:
    record_id = make_id(source)
    user = [{"type": "text", "text": request}, {"type": "audio", "audio": "flac"}]
    content: dict = {
        "id": record_id,
        "split": split,
        "task": task,
        "language": language,
        "duration": round(len(samples) / SAMPLE_RATE, 3),
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ],
    }
    return Record(record_id, content, {"flac": to_flac(samples)})


def asterisk_samples(
    folder: str | Path, dropped: Dropped | None = None, languages: Collection[str] | None = None
) -> Iterator[Record]:
    """Yields the prompts of each language, one speaker per language.

    Transcripts with brackets are left out: they describe tones, or the way of speaking.

    Args:
        folder: holds `asterisk/sounds/{language}_*/**.g722` and `doc/*/core-sounds-{language}.txt.gz`.
        dropped: gets (file, reason) for each recording left out.
        languages: use these only; None takes all that exist.

    Raises:
        UserError: there are no transcripts; PyAV or soundfile is missing.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    for language, sentences in _prompts(folder).items():
        if languages is not None and language not in languages:
            continue
        for sounds in sorted(folder.glob(f"asterisk/sounds/{language}_*")):
            for name, text in sentences.items():
                file = sounds / f"{name}.g722"
                name_in_set = file.relative_to(folder).as_posix()
                if not _is_plain(text):
                    dropped.append((name_in_set, f"not a plain transcript: {text[:60]!r}"))
                    continue
                yield from _record(file, f"asterisk/{name_in_set}", split_of_sentence(text), language, text, dropped)


def asterisk_translations(folder: str | Path, dropped: Dropped | None = None) -> Iterator[Record]:
    """Yields the prompts of each language with their texts in each of the other languages.

    A pair whose sentence and translation are in different splits is left out, so that held-out texts are in no training
    record, here and in `asterisk_samples`. Args, Raises: as there.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    prompts = _prompts(folder)
    for language, sentences in prompts.items():
        others = {other: texts for other, texts in prompts.items() if other != language}
        for sounds in sorted(folder.glob(f"asterisk/sounds/{language}_*")):
            for name, said in sentences.items():
                file = sounds / f"{name}.g722"
                for other, texts in others.items():
                    text = texts.get(name, "")
                    if not (_is_plain(said) and _is_plain(text)):
                        continue
                    source = f"asterisk/{file.relative_to(folder).as_posix()}/{other}"
                    if split_of_sentence(said) != split_of_sentence(text):
                        dropped.append((source, "sentence and translation are in different splits"))
                        continue
                    make = partial(translation_record, said=said)
                    yield from _record(file, source, split_of_sentence(said), other, text, dropped, make)


def _prompts(folder: Path) -> dict[str, dict[str, str]]:
    """Language -> name of a prompt -> its transcript."""
    paths = sorted(folder.glob("doc/*/core-sounds-*.txt.gz"))
    if not paths:
        raise UserError(f"{folder}: has no doc/*/core-sounds-*.txt.gz")
    prompts = {}
    for path in paths:
        with gzip.open(path) as file:
            prompts[path.name.removeprefix("core-sounds-").partition(".")[0]] = parse_prompts(_decoded(file.read()))
    return prompts


def _is_plain(text: str) -> bool:
    return bool(re.search(r"\w", text)) and not re.search(r"[][()<>{}]", text)


def spoken_stamps(
    folder: str | Path, dropped: Dropped | None = None, languages: Collection[str] = STAMP_LANGUAGES
) -> Iterator[Record]:
    """Yields the spoken descriptions of Tux Paint's stamps.

    Stamps with the same English sentence, or the same sentence in any language, are in one split, for any `languages`.

    Args:
        folder: holds `stamps/**/{name}.txt` and `{name}_desc_{language}.ogg` beside it.
        dropped: gets (file, reason) for each recording left out.
        languages: of STAMP_LANGUAGES.

    Raises:
        UserError: there are no recordings; PyAV or soundfile is missing.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    stamps: list[tuple[Path, str, str, str]] = []  # (file, language, sentence, English concept)
    for path in sorted(folder.glob("stamps/**/*_desc_??.ogg")):
        stem, _, language = path.stem.rpartition("_desc_")
        if language not in STAMP_LANGUAGES:
            continue
        try:
            stamps.append((path, language, *_stamp_sentences(path.with_name(f"{stem}.txt"), language)))
        except UserError as error:
            if language in languages:
                dropped.append((path.relative_to(folder).as_posix(), str(error)))
    if not stamps:
        raise UserError(f"{folder}: has no stamps/**/*_desc_*.ogg with a sentence")
    concepts = join_concepts((concept, f"{language}/{words_of(text)}") for _, language, text, concept in stamps)
    for path, language, text, concept in stamps:
        if language not in languages:
            continue
        split = split_of(concepts[concept], VALIDATION_SHARE, TEST_SHARE)
        source = f"tuxpaint/{path.relative_to(folder).as_posix()}"
        yield from _record(path, source, split, language, text, dropped)


def librivox_readings(folder: str | Path, dropped: Dropped | None = None) -> Iterator[Record]:
    """Yields the LibriVox readings of pocketsphinx's tests, all of them held out.

    Args:
        folder: holds `transcription`, lines `<s> words </s> (name)`, and `{name}.wav`.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    path = folder / "transcription"
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for text, name in re.findall(r"<s> (.+) </s> \((\S+)\)", path.read_text(encoding="utf-8")):
        yield from _record(folder / f"{name}.wav", f"pocketsphinx/{name}", "test", "en", text, dropped)


def aligner_clips(folder: str | Path, dropped: Dropped | None = None) -> Iterator[Record]:
    """Yields the transcribed clips of the Montreal Forced Aligner's tests, all of them held out.

    Args:
        folder: holds `lab/{name}.lab` and `wav/{name}.*`.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    paths = sorted(folder.glob("lab/*.lab"))
    if not paths:
        raise UserError(f"{folder}: has no lab/*.lab")
    for path in paths:
        text = " ".join(re.sub(r"\[\w*\]|<\w*>", " ", path.read_text(encoding="utf-8")).split())
        language = next((code for start, code in _MFA_LANGUAGES.items() if path.name.startswith(start)), "en")
        for sound in sorted(folder.glob(f"wav/{path.stem}.*")):
            yield from _record(sound, f"mfa/{sound.name}", "test", language, text, dropped)


# ------------------------------------------------------------------------------------------------------------- texts


def parse_prompts(text: str) -> dict[str, str]:
    """Name -> text of the lines `name: text`; other lines (comments, blanks) are skipped."""
    lines = (re.match(r"([\w/.+-]+):\s*(.*)", line) for line in text.splitlines())
    return {match[1]: " ".join(match[2].split()) for match in lines if match}


def words_of(text: str) -> str:
    """The text in lower case without punctuation; sentences with equal words count as equal."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split_of_sentence(text: str) -> str:
    """The split of a sentence: independent of speaker, case and punctuation."""
    return split_of(words_of(text), VALIDATION_SHARE, TEST_SHARE)


def _stamp_sentences(path: Path, language: str) -> tuple[str, str]:
    """(the sentence in that language, the concept of the English one)."""
    concept = tuxpaint.concept_of(tuxpaint.sentence_of(path.with_suffix("")))
    for line in _decoded(path.read_bytes()).splitlines():
        key, _, text = line.partition(".utf8=")
        if key == language and words_of(text):
            return " ".join(text.split()), concept
    raise UserError(f"{path}: has no sentence in {language}")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


# ------------------------------------------------------------------------------------------------------------- sound


def read_recording(path: Path) -> np.ndarray:
    """Read a recording -> int16 [T], mono, 16 kHz; raises UserError as `speech.reading.read_sound`."""
    return read_sound(path, dtype=torch.int16, max_seconds=math.inf, allow_truncated=True).numpy()


def resample_to_16_khz(samples: np.ndarray, rate: int) -> np.ndarray:
    """int16 [T] at `rate` Hz -> int16 [T'] at 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this runs in worker processes, one per core
    try:
        wave = resample(torch.from_numpy(samples.astype(np.float32)), rate)
    finally:
        torch.set_num_threads(threads)
    return wave.round().clamp(-32768, 32767).to(torch.int16).numpy()


def to_flac(samples: np.ndarray) -> bytes:
    """int16 [T] at 16 kHz as a FLAC file."""
    out = io.BytesIO()
    soundfile = import_extra("soundfile", "speech", "writing FLAC")
    soundfile.write(out, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _record(
    path: Path,
    source: str,
    split: str,
    language: str,
    text: str,
    dropped: Dropped,
    make: Callable[..., Record] = transcription_record,
) -> Iterator[Record]:
    """Yields the record of a recording; a missing or broken one goes to `dropped`."""
    if not path.is_file():
        dropped.append((source, "has no recording"))
        return
    try:
        samples = read_recording(path)
    except MissingExtraError:
        raise
    except UserError as error:
        dropped.append((source, str(error)))
        return
    yield make(source, split, language, text, samples)
