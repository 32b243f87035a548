"""Contact sheets: some frames of a clip side by side, each with the second at which it is shown."""

from PIL import Image, ImageDraw, ImageFont

from data_prep.steps.clips import ShownClip

FRAMES = 4
GAP = 2  # px between frames
LINE = 12  # px of a time stamp


def contact_sheet(clip: ShownClip, side: int) -> Image.Image:
    """RGB; every frame at most `side` px wide and high, its time beneath it."""
    chosen = clip.places(FRAMES)
    frames = [clip.frames[place].copy() for place in chosen]
    for frame in frames:
        frame.thumbnail((side, side))
    width, height = frames[0].size
    sheet = Image.new("RGB", ((width + GAP) * len(frames) - GAP, height + LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 2)
    for number, (frame, place) in enumerate(zip(frames, chosen, strict=True)):
        x = number * (width + GAP)
        sheet.paste(frame, (x, 0))
        draw.text((x + 1, height - 1), f"{clip.times[place]:.1f} s", "black", font)
    return sheet
