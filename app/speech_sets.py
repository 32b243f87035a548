"""Shards of real recordings with their words: what a speech stage trains on, and two sets that are held out whole.

    python -m app.speech_sets [--output data/speech]

Sets: Asterisk's prompts in five languages, their translations into each other, Tux Paint's spoken stamps; LibriVox
readings and the Montreal Forced Aligner's clips. Each that is there is kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from app.demo import prepare
from data_prep import recordings
from mm.training.command import mistakes_in_one_line

SETS: dict[str, tuple[str, Callable]] = {
    "asterisk": ("asterisk-sounds", recordings.asterisk_samples),
    "asterisk_translations": ("asterisk-sounds", recordings.asterisk_translations),
    "stamps": ("tuxpaint-speech", recordings.spoken_stamps),
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
