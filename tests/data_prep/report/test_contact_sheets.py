import numpy as np
from PIL import Image

from data_prep.report.contact_sheets import contact_sheet
from tests.data_prep.clip_files import decoded


def test_a_contact_sheet_shows_frames_in_order_with_their_times():
    frames = [Image.new("RGB", (200, 100), (value, 0, 0)) for value in (0, 60, 120, 180, 240)]
    sheet = contact_sheet(decoded(frames, 5.0), 96)
    assert sheet.size == (4 * 96 + 3 * 2, 48 + 12)
    assert [sheet.getpixel((98 * index + 48, 24))[0] for index in range(4)] == [0, 60, 180, 240]
    stamps = [np.asarray(sheet.crop((98 * n, 48, 98 * n + 96, 60))) for n in range(4)]
    assert all(stamp.min() < 128 for stamp in stamps) and not np.array_equal(stamps[0], stamps[1])
