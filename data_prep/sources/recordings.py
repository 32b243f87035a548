"""Recordings that come with their words -> shard records to transcribe, 16 kHz mono FLAC each.

Sets: the prompts of the Asterisk telephone system, Tux Paint's spoken descriptions, and two small ones that are held
out whole. A sentence of a set is in one split, whoever says it.
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
from speech.prompts import TRANSCRIBE
from speech.reading import read_sound, resample

SAMPLE_RATE = 16_000
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
STAMP_LANGUAGES = ("bg", "es", "fr", "ro", "ru")  # of those that tuxpaint-stamps-default speaks, the fullest
_MFA_LANGUAGES = {
    "13697_": "es",
    "common_voice_ja": "ja",
    "se10x016": "sv",
}  # by how a file's name begins; else English


def transcription_record(source: str, split: str, language: str, text: str, samples: np.ndarray) -> Record:
    """A record that asks to repeat what is said; without text, "silence" is its task.

    Args:
        source: names the recording; the id follows from it.
        language: a key of LANGUAGES.
        samples: int16 [T] at 16 kHz.
    """
    request = f"{TRANSCRIBE} {LANGUAGES[language]}:"
    return _answered(source, split, "transcription" if text else "silence", language, request, text, samples)


def with_free_form_question(record: Record) -> Record:
    """A transcription that is asked for behind the sound, in one of QUESTIONS, by its id; the paper has one wording.

    A model that has been asked in one wording alone answers no other.
    """
    sound = record.json["messages"][0]["content"][1]
    question = QUESTIONS[int(record.id, 16) // 8 % len(QUESTIONS)]  # the lowest bits may have chosen the record
    asked = {"role": "user", "content": [sound, {"type": "text", "text": question}]}
    return replace(record, json={**record.json, "messages": [asked, *record.json["messages"][1:]]})


def translation_record(source: str, split: str, language: str, text: str, samples: np.ndarray, said: str) -> Record:
    """A record that asks to put `said` into another language (paper §8.2.2); arguments as `transcription_record`,
    language and text being the translation's."""
    request = f"Translate the following sentence into {LANGUAGES[language]}:"
    record = _answered(source, split, "translation", language, request, text, samples)
    record.json["said"] = said
    return record


def _answered(
    source: str, split: str, task: str, language: str, request: str, text: str, samples: np.ndarray
) -> Record:
    record_id = make_id(source)
    asked = [{"type": "text", "text": request}, {"type": "audio", "audio": "flac"}]
    content = {
        "id": record_id,
        "split": split,
        "task": task,
        "language": language,
        "duration": round(len(samples) / SAMPLE_RATE, 3),
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ],
    }
    return Record(record_id, content, {"flac": to_flac(samples)})


def asterisk_samples(
    folder: str | Path, dropped: Dropped | None = None, languages: Collection[str] | None = None
) -> Iterator[Record]:
    """Yields the prompts of each language, one speaker per language.

    Lines with anything in brackets are left out: they describe tones, or say how the words are said.

    Args:
        folder: holds `asterisk/sounds/{language}_*/**.g722` and `doc/*/core-sounds-{language}.txt.gz`.
        dropped: gets (file, reason) for each recording left out.
        languages: only these; None takes all that are there.

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
                where = file.relative_to(folder).as_posix()
                if not _is_plain(text):
                    dropped.append((where, f"no plain words: {text[:60]!r}"))
                    continue
                yield from _record(file, f"asterisk/{where}", split_of_sentence(text), language, text, dropped)


def asterisk_translations(folder: str | Path, dropped: Dropped | None = None) -> Iterator[Record]:
    """Yields the prompts of each language with each of the other languages' words for the same prompt.

    Where a sentence and its translation are in different splits the pair is in none: what is held out is held out on
    both sides, and from `asterisk_samples` as well. Arguments and errors: as there.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    prompts = _prompts(folder)
    for language, sentences in prompts.items():
        others = {other: given for other, given in prompts.items() if other != language}
        for sounds in sorted(folder.glob(f"asterisk/sounds/{language}_*")):
            for name, said in sentences.items():
                file = sounds / f"{name}.g722"
                for other, given in others.items():
                    text = given.get(name, "")
                    if not (_is_plain(said) and _is_plain(text)):
                        continue
                    source = f"asterisk/{file.relative_to(folder).as_posix()}/{other}"
                    if split_of_sentence(said) != split_of_sentence(text):
                        dropped.append((source, "sentence and translation are in different splits"))
                        continue
                    make = partial(translation_record, said=said)
                    yield from _record(file, source, split_of_sentence(said), other, text, dropped, make)


def _prompts(folder: Path) -> dict[str, dict[str, str]]:
    """Language -> prompt's name -> its words."""
    texts = sorted(folder.glob("doc/*/core-sounds-*.txt.gz"))
    if not texts:
        raise UserError(f"{folder}: no doc/*/core-sounds-*.txt.gz in it")
    prompts = {}
    for path in texts:
        with gzip.open(path) as file:
            prompts[path.name.removeprefix("core-sounds-").partition(".")[0]] = parse_prompts(_decoded(file.read()))
    return prompts


def _is_plain(text: str) -> bool:
    return bool(re.search(r"\w", text)) and not re.search(r"[][()<>{}]", text)


def spoken_stamps(
    folder: str | Path, dropped: Dropped | None = None, languages: Collection[str] = STAMP_LANGUAGES
) -> Iterator[Record]:
    """Yields the spoken descriptions of Tux Paint's stamps.

    Stamps with one English sentence, or with one sentence in any language, are in one split, whatever languages are
    asked for.

    Args:
        folder: holds `stamps/**/{name}.txt` and `{name}_desc_{language}.ogg` beside it.
        dropped: gets (file, reason) for each recording left out.
        languages: of STAMP_LANGUAGES.

    Raises:
        UserError: there are no recordings; PyAV or soundfile is missing.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    found: list[tuple[Path, str, str, str]] = []  # (file, language, sentence, English concept)
    for path in sorted(folder.glob("stamps/**/*_desc_??.ogg")):
        stem, _, language = path.stem.rpartition("_desc_")
        if language not in STAMP_LANGUAGES:
            continue
        try:
            found.append((path, language, *_stamp_sentences(path.with_name(f"{stem}.txt"), language)))
        except ValueError as error:
            if language in languages:
                dropped.append((path.relative_to(folder).as_posix(), str(error)))
    if not found:
        raise UserError(f"{folder}: no stamps/**/*_desc_*.ogg in it that have a sentence")
    concepts = join_concepts((concept, f"{language}/{words_of(text)}") for _, language, text, concept in found)
    for path, language, text, concept in found:
        if language not in languages:
            continue
        split = split_of(concepts[concept], VALIDATION_SHARE, TEST_SHARE)
        source = f"tuxpaint/{path.relative_to(folder).as_posix()}"
        yield from _record(path, source, split, language, text, dropped)


def librivox_readings(folder: str | Path, dropped: Dropped | None = None) -> Iterator[Record]:
    """Yields the readings that come with pocketsphinx, all of them held out.

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
    """Yields the clips that come with the Montreal Forced Aligner and have one transcript, all of them held out.

    Args:
        folder: holds `lab/{name}.lab` and `wav/{name}.*`.
    """
    folder, dropped = Path(folder), [] if dropped is None else dropped
    paths = sorted(folder.glob("lab/*.lab"))
    if not paths:
        raise UserError(f"{folder}: no lab/*.lab in it")
    for path in paths:
        text = " ".join(re.sub(r"\[\w*\]|<\w*>", " ", path.read_text(encoding="utf-8")).split())
        language = next((code for start, code in _MFA_LANGUAGES.items() if path.name.startswith(start)), "en")
        for sound in sorted(folder.glob(f"wav/{path.stem}.*")):
            yield from _record(sound, f"mfa/{sound.name}", "test", language, text, dropped)


# ------------------------------------------------------------------------------------------------------------- texts


def parse_prompts(text: str) -> dict[str, str]:
    """Lines `name: words` -> name -> words; others (comments, blanks) are skipped."""
    lines = (re.match(r"([\w/.+-]+):\s*(.*)", line) for line in text.splitlines())
    return {match[1]: " ".join(match[2].split()) for match in lines if match}


def words_of(text: str) -> str:
    """Lower case, without punctuation: what tells sentences apart."""
    return " ".join(re.findall(r"\w+", text.lower()))


def split_of_sentence(text: str) -> str:
    """The split of a sentence: the same whoever says it and however it is written."""
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


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """int16 [T] at any rate -> int16 [T'] at 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processes that speak have a core each
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
    if not path.is_file():
        dropped.append((source, "there is no recording of it"))
        return
    try:
        samples = read_recording(path)
    except MissingExtraError:
        raise
    except UserError as error:
        dropped.append((source, str(error)))
        return
    yield make(source, split, language, text, samples)
