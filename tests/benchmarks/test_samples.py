"""The sheet of what the bundled models draw."""

from PIL import Image

from benchmarks import samples


def test_a_sheet_has_a_row_for_each_caption_and_both_models_pictures(tmp_path):
    out = tmp_path / "samples.png"
    assert samples.main(["--captions", "1", "--seeds", "1", "--out", str(out)]) == 0
    sheet = Image.open(out)
    assert sheet.width > 2 * 144 and sheet.height > 144
    assert len(sheet.getcolors(2**24)) > 100
