"""Makes shards of recordings with their words: the training sets of the speech stages, and two sets held out whole.

    python -m demos.speech_sets [--output data/speech]

Sets: Asterisk's prompts and Tux Paint's spoken stamps, five languages each, one set per language; the English prompts
with a free-form question; the prompts' translations into one another; English sentences of WordNet in twelve synthetic
voices; recordings without speech; LibriVox readings and the Montreal Forced Aligner's clips. A set that exists is kept.
The sentences take six minutes on two cores.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import Namespace

from data_prep.sources import recordings
from data_prep.sources.files import Dropped
from data_prep.steps.ngrams import read_texts
from data_prep.synthetic.spoken_words import Espeak, Flite, silences, spoken_sentences
from demos.command import run_demo
from demos.image import prepare
from foundation.options import new_parser
from shards.format import Record

NUM_SENTENCES = 40_000
NUM_SILENCES = 300
ESPEAK_VOICES = (
    *("en-us", "en-us+f3", "en-us+f5", "en-us+m7", "en-us-nyc"),
    *("en-gb-x-rp", "en-gb-x-rp+f2", "en-gb-scotland+m3"),
)
FLITE_VOICES = ("slt", "rms", "awb", "kal16")


def _spoken_sentences(texts: Path, flite: Path, _: Dropped) -> Iterator[Record]:
    voices: list[Espeak | Flite] = [Espeak(name) for name in ESPEAK_VOICES]
    voices += [Flite(flite, name) for name in FLITE_VOICES * 2]  # eight of each kind
    return spoken_sentences(read_texts(texts), voices, NUM_SENTENCES, workers=os.cpu_count() or 1)


def _prompts_with_questions(folder: Path, dropped: Dropped) -> Iterator[Record]:
    return map(recordings.with_free_form_question, recordings.asterisk_samples(folder, dropped, languages=("en",)))


def _silences(_: Dropped) -> Iterator[Record]:
    return silences(NUM_SILENCES)


def _one_per_language(
    name: str, asset: str, to_samples: Callable[..., Iterator[Record]], languages: Sequence[str]
) -> dict[str, tuple]:
    return {f"{name}_{language}": (partial(to_samples, languages=(language,)), asset) for language in languages}


SETS: dict[str, tuple] = {  # name -> the arguments of `demos.image.prepare` after the folder
    **_one_per_language("asterisk", "asterisk-sounds", recordings.asterisk_samples, recordings.ASTERISK_LANGUAGES),
    **_one_per_language("stamps", "tuxpaint-speech", recordings.spoken_stamps, recordings.STAMP_LANGUAGES),
    "asterisk_translations": (recordings.asterisk_translations, "asterisk-sounds"),
    "asterisk_en_asked": (_prompts_with_questions, "asterisk-sounds"),
    "sentences": (_spoken_sentences, "wordnet-base", "flite-voices"),
    "silences": (_silences,),
    "librivox": (recordings.librivox_readings, "pocketsphinx-speech"),
    "aligner": (recordings.aligner_clips, "mfa-speech"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and make the sets."""
    parser = new_parser("speech-sets", "Make shards of recordings with their words.")
    parser.add_argument("--output", type=Path, default=Path("data/speech"), help="folder of the sets")

    def run_with(options: Namespace) -> None:
        for name, (to_samples, *assets) in SETS.items():
            prepare(options.output / name, to_samples, *assets)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
