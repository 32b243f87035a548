"""Contact sheets: some frames of a clip side by side, each with the time at which it is shown."""

from PIL import Image, ImageDraw, ImageFont

from data_prep.steps.clips import DecodedClip

FRAMES = 4
GAP = 2  # px between frames
LINE = 12  # px, height of the time stamps


def contact_sheet(clip: DecodedClip, side: int) -> Image.Image:
    """An RGB picture of FRAMES frames, each at most `side` px wide and high, with its time below it."""
    indices = clip.frame_indices(FRAMES)
    frames = [clip.frames[index].copy() for index in indices]
    for frame in frames:
        frame.thumbnail((side, side))
    width, height = frames[0].size
    sheet = Image.new("RGB", ((width + GAP) * len(frames) - GAP, height + LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 2)
    for column, (frame, index) in enumerate(zip(frames, indices, strict=True)):
        x = column * (width + GAP)
        sheet.paste(frame, (x, 0))
        draw.text((x + 1, height - 1), f"{clip.times[index]:.1f} s", "black", font)
    return sheet
