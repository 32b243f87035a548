"""Shards of recordings with their words: what a speech stage trains on, and two sets that are held out whole.

    python -m demos.speech_sets [--output data/speech]

Sets: Asterisk's prompts and Tux Paint's spoken stamps, in five languages each and one set for each language; the
English prompts with a question behind each; the prompts' translations into each other; English sentences, WordNet's, in
twelve synthetic voices; sounds in which nothing is said; LibriVox readings and the Montreal Forced Aligner's clips.
Each that is there is kept. The sentences take two cores six minutes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from data_prep.sources import recordings
from data_prep.steps.ngrams import read_texts
from data_prep.synthetic.spoken_words import Espeak, Flite, silences, spoken_sentences
from demos.image import prepare
from mm.training.command import mistakes_in_one_line
from shards.format import Record

NUM_SENTENCES = 40_000
NUM_SILENCES = 300
NAMES = ("en-us", "en-us+f3", "en-us+f5", "en-us+m7", "en-us-nyc", "en-gb-x-rp", "en-gb-x-rp+f2", "en-gb-scotland+m3")
FLITE = ("slt", "rms", "awb", "kal16")


def _spoken_sentences(texts: Path, flite: Path, _: recordings.Dropped) -> Iterator[Record]:
    voices = [*map(Espeak, NAMES), *[Flite(flite, name) for name in FLITE] * 2]  # as many of the one as of the other
    return spoken_sentences(read_texts(texts), voices, NUM_SENTENCES, workers=os.cpu_count() or 1)


def _asked_prompts(folder: Path, dropped: recordings.Dropped) -> Iterator[Record]:
    return map(recordings.asked_freely, recordings.asterisk_samples(folder, dropped, languages=("en",)))


def _silences(_: recordings.Dropped) -> Iterator[Record]:
    return silences(NUM_SILENCES)


def _in_languages(name: str, asset: str, to_samples: Callable, languages: Sequence[str]) -> dict:
    return {f"{name}_{one}": (partial(to_samples, languages=(one,)), asset) for one in languages}


SETS: dict[str, tuple] = {  # name -> what makes its records, and the assets that it makes them of
    **_in_languages("asterisk", "asterisk-sounds", recordings.asterisk_samples, recordings.ASTERISK_LANGUAGES),
    **_in_languages("stamps", "tuxpaint-speech", recordings.spoken_stamps, recordings.STAMP_LANGUAGES),
    "asterisk_translations": (recordings.asterisk_translations, "asterisk-sounds"),
    "asterisk_en_asked": (_asked_prompts, "asterisk-sounds"),
    "sentences": (_spoken_sentences, "wordnet-base", "flite-voices"),
    "silences": (_silences,),
    "librivox": (recordings.librivox_readings, "pocketsphinx-speech"),
    "aligner": (recordings.aligner_clips, "mfa-speech"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="speech_sets", description=__doc__, exit_on_error=False)
    parser.add_argument("--output", type=Path, default=Path("data/speech"), help="folder of the sets")
    with mistakes_in_one_line("speech_sets"):
        output = parser.parse_args(argv).output
        for name, (to_samples, *assets) in SETS.items():
            prepare(output / name, to_samples, *assets)


if __name__ == "__main__":
    main()
