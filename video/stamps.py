"""Time stamps as files have them: that begin again, that are missing, equal, or in the order of decoding.

Nothing here reads a file. All stamps are in ticks of the stream's time base.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np

from foundation.errors import UserError

JUMP_SECONDS = 10.0  # FFmpeg's -dts_delta_threshold: in transport streams, a longer jump is no pause
NO_TIMES = "0 frames per second: its frames have no times"
RESTART_SECONDS = 0.1  # FFmpeg's tolerance for decoding stamps that go back


class JoinedStamps:
    """Lets the stamps of joined files go on where those of the part before end.

    A part begins where the stamps of decoding go back: at a key frame, or by more than `RESTART_SECONDS`. In the
    formats that FFmpeg calls discontinuous (transport streams), one also begins where they jump ahead by
    `JUMP_SECONDS`. These are the rules of the program ffmpeg.

    Args:
        time_base: seconds per tick.
        jumps: whether a long jump ahead begins a part.
    """

    def __init__(self, time_base: Fraction, jumps: bool) -> None:
        self.restart = RESTART_SECONDS / float(time_base)
        self.jump = JUMP_SECONDS / float(time_base) if jumps else float("inf")
        self.offset = 0
        self.num_parts = 1
        self._last: int | None = None  # decoding stamp of the packet before
        self._end: int | None = None  # of the last frame of this part, in its own stamps

    def advance(self, pts: int | None, dts: int | None, duration: int, is_key: bool) -> int:
        """Take the stamps of the next packet, and return the ticks to add to them."""
        dts = self._last if dts is None else dts  # without one, nothing tells whether it goes back
        shown = dts if pts is None else pts
        if dts is None or shown is None:
            return self.offset
        if self._last is not None and self._end is not None:
            back = self._last - dts
            goes_back = back > self.restart or (back > 0 and is_key)
            if (goes_back and shown < self._end) or -back > self.jump + duration:
                self.offset += self._end - shown
                self.num_parts += 1
                self._end = None
        self._last = dts
        self._end = shown + duration if self._end is None else max(self._end, shown + duration)
        return self.offset


def display_stamps(pts: Sequence[int | None], durations: Sequence[int], step: int) -> list[int]:
    """When each frame is shown, from what the decoder says of the frames, which come in the order of display.

    A missing stamp is the end of the frame before. Stamps in another order than the frames are those of another frame,
    as in AVI, whose packets have stamps in the order of decoding: they are sorted. Of frames with equal stamps the last
    is shown.

    Args:
        pts: the frames' stamps.
        durations: of the frames in ticks; 0 if unknown.
        step: ticks of a frame whose duration is unknown; 0 if unknown too.

    Returns:
        as many stamps, none below the one before.

    Raises:
        UserError: there is no time in them.
    """
    known = [stamp for stamp in pts if stamp is not None]
    if not known:
        raise UserError(NO_TIMES)
    steps = [duration if duration > 0 else step for duration in durations]
    first = next(index for index, stamp in enumerate(pts) if stamp is not None)
    stamps = [known[0] - sum(steps[index:first]) for index in range(first)]
    for index in range(first, len(pts)):
        stamp = pts[index]
        stamps.append(stamps[-1] + steps[index - 1] if stamp is None else stamp)
    stamps.sort()
    if len(stamps) > 1 and stamps[0] == stamps[-1]:
        raise UserError(NO_TIMES)
    return stamps


def median_step(stamps: Sequence[int]) -> int:
    """The median distance of ascending stamps; 0 for a single one."""
    steps = [b - a for a, b in pairwise(stamps) if b > a]
    return int(np.median(steps)) if steps else 0
