"""Synthetic pictures with known near duplicates: scenes with edited copies, and hard negatives."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SIDE = 160  # px
NEGATIVES = ("template", "plain", "logo", "page")


def scene(seed: int, side: int = SIDE) -> Image.Image:
    """Smooth coloured noise with shapes in front of it; every seed gives another picture."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = generator.uniform(0, picture.width), generator.uniform(0, picture.height)
        wide, high = generator.uniform(side / 12, side / 3, 2)
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((x - wide, y - high, x + wide, y + high), fill=tuple(int(c) for c in generator.integers(0, 256, 3)))
    return picture


def edited(picture: Image.Image, generator: np.random.Generator) -> bytes:
    """A JPEG copy with a random edit: rescaled, brighter or darker, blurred, cropped, or only recompressed."""
    edit = generator.integers(0, 5)
    if edit == 0:
        scale = generator.uniform(0.5, 0.9)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    elif edit == 1:
        picture = ImageEnhance.Brightness(picture).enhance(generator.uniform(0.9, 1.1))
    elif edit == 2:
        picture = picture.filter(ImageFilter.GaussianBlur(generator.uniform(0.5, 1.5)))
    elif edit == 3:
        cut = generator.uniform(0.005, 0.02)
        x, y = cut * picture.width, cut * picture.height
        picture = picture.crop((round(x), round(y), round(picture.width - x), round(picture.height - y)))
    return jpeg(picture, int(generator.integers(40, 90)))


def negative(kind: str, seed: int, side: int = SIDE) -> Image.Image:
    """A picture of a kind (of NEGATIVES) whose members are similar and no copies."""
    generator = np.random.default_rng(seed)
    if kind == "plain":
        return Image.new("RGB", (side, side), tuple(int(c) for c in generator.integers(0, 256, 3)))
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    if kind == "template":  # a card with a number
        draw.rectangle((0, 0, side, side // 4), fill=(30, 70, 140))
        draw.text((side // 8, side // 3), f"{seed:05d}", fill="black", font_size=side // 4)
    elif kind == "logo":
        x, y, size = generator.uniform(side * 0.3, side * 0.7, 3)
        colour = tuple(int(c) for c in generator.integers(0, 200, 3))
        draw.regular_polygon((x, y, size / 3), int(generator.integers(3, 9)), int(generator.integers(0, 90)), colour)
    else:
        for line, length in enumerate(generator.uniform(side * 0.3, side * 0.9, 14)):
            y = side * (0.06 + line * 0.065)
            draw.rectangle((side * 0.06, y, length, y + side * 0.03), fill=(40, 40, 40))
    return picture


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def known_graph(count: int) -> Iterator[tuple[str, int, bytes]]:
    """Yields (kind, component, JPEG) of `count` pictures: half scenes and their copies, half hard negatives."""
    generator, component = np.random.default_rng(0), 0
    made = 0
    while made < count:
        if component % 7:  # six negatives follow a scene, which has five copies on average
            kind = NEGATIVES[component % len(NEGATIVES)]
            yield kind, component, jpeg(negative(kind, component))
            made += 1
        else:
            picture, copies = scene(component), int(generator.integers(0, 11))
            files = [jpeg(picture), *(edited(picture, generator) for _ in range(copies))]
            for file in files[: count - made]:
                yield "scene", component, file
            made += len(files)
        component += 1
