"""Shards of recordings with their words: what a speech stage trains on, and two sets that are held out whole.

    python -m app.speech_sets [--output data/speech]

Sets: Asterisk's prompts and Tux Paint's spoken stamps, in five languages each and one set for each language; the
prompts' translations into each other; English sentences, WordNet's, in synthetic voices; LibriVox readings and the
Montreal Forced Aligner's clips. Each that is there is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from app.demo import prepare
from data_prep import recordings
from data_prep.ngrams import read_texts
from data_prep.spoken_words import Espeak, Flite, spoken_sentences
from mm.assets import fetch
from mm.training.command import mistakes_in_one_line
from shards.format import Record

NUM_SENTENCES = 4000
VOICES = (Espeak("en-us"), Espeak("en-us+f3"), Espeak("en-gb-x-rp"), Espeak("en-gb-scotland+m3"))


def _spoken_sentences(folder: Path, _: recordings.Dropped) -> Iterator[Record]:
    flite = fetch("flite-voices")
    voices = (*VOICES, Flite(flite, "slt"), Flite(flite, "rms"))
    return spoken_sentences(read_texts(folder), voices, NUM_SENTENCES)


def _in_languages(name: str, asset: str, to_samples: Callable, languages: Sequence[str]) -> dict:
    return {f"{name}_{one}": (asset, partial(to_samples, languages=(one,))) for one in languages}


SETS: dict[str, tuple[str, Callable]] = {
    **_in_languages("asterisk", "asterisk-sounds", recordings.asterisk_samples, recordings.ASTERISK_LANGUAGES),
    **_in_languages("stamps", "tuxpaint-speech", recordings.spoken_stamps, recordings.STAMP_LANGUAGES),
    "asterisk_translations": ("asterisk-sounds", recordings.asterisk_translations),
    "sentences": ("wordnet-base", _spoken_sentences),
    "librivox": ("pocketsphinx-speech", recordings.librivox_readings),
    "aligner": ("mfa-speech", recordings.aligner_clips),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="speech_sets", description=__doc__, exit_on_error=False)
    parser.add_argument("--output", type=Path, default=Path("data/speech"), help="folder of the sets")
    with mistakes_in_one_line("speech_sets"):
        output = parser.parse_args(argv).output
        for name, (asset, to_samples) in SETS.items():
            prepare(output / name, asset, to_samples)


if __name__ == "__main__":
    main()
