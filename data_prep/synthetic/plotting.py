"""matplotlib and its fonts, set up so that a drawing is the same on every machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFont

from foundation.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES = ("DejaVu Sans", "DejaVu Serif", "STIXGeneral")  # shipped with matplotlib
FONT_FILES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")


@contextmanager
def matplotlib_defaults(family: str, size: float) -> Iterator[None]:
    """A context in which matplotlib has its default settings and the given font, size in points."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": family, "font.size": size})
        yield


def render(figure: "Figure") -> Image.Image:
    """A figure as an RGB picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(figure)
    agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())


@lru_cache(maxsize=64)
def font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's font files for drawing with Pillow; the size is in pixels."""
    path = Path(_matplotlib().get_data_path()) / "fonts" / "ttf" / file
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=8)
def code_points_of(file: str) -> frozenset[int]:
    """The code points that one of matplotlib's font files has a glyph for."""
    path = Path(_matplotlib().get_data_path()) / "fonts" / "ttf" / file
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


def _matplotlib() -> ModuleType:
    return import_extra("matplotlib", "data", "drawing")
