"""Image files of every kind, their folders, and files that are not images."""

import io
import os
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageCms

from t2tvit.data.images import describe_skipped, list_classes, list_images, load_image
from t2tvit.errors import InputError
from t2tvit.training.config import RunConfig
from t2tvit.training.pipeline import eval_transform

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


# Modes


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bit_images_are_read_as_by_pillow(tmp_path, pixels, mode):
    path = saved(tmp_path, Image.fromarray(pixels))
    expected = Image.open(path).convert(mode)
    assert load_image(path, mode).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, name, mode):
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257), name)
    pixels = np.asarray(load_image(path, mode))
    np.testing.assert_array_equal(pixels if mode == "L" else pixels[..., 1], GREY)


def test_sixteen_bit_pgm_and_big_endian_tiff(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    (tmp_path / "deep.pgm").write_bytes(b"P5 30 20 65535\n" + deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "deep.pgm", "L")), GREY)
    path = saved(
        tmp_path, Image.frombytes("I;16B", (30, 20), deep.astype(">u2").tobytes()), "b.tif"
    )
    np.testing.assert_array_equal(np.asarray(load_image(path, "L")), GREY)


def test_floats_from_0_to_1_are_scaled_and_others_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.float32) / 255), "unit.tif")
    np.testing.assert_array_equal(np.asarray(load_image(path, "L")), GREY)
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.float32)), "large.tif")
    with pytest.raises(
        InputError, match="large.tif cannot be read .*floats from 0 to 255, expected"
    ):
        load_image(path)
    path = saved(tmp_path, Image.fromarray(np.float32([[0, np.nan]])), "nan.tif")
    with pytest.raises(InputError, match="nan.tif cannot be read .*floats"):
        load_image(path)


def test_integers_of_unknown_range_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.int32) * 257), "wide.tif")
    with pytest.raises(InputError, match="wide.tif cannot be read .*32-bit integers"):
        load_image(path)


@pytest.mark.parametrize(
    "mode, name",
    [
        *[("1", "image.png"), ("LA", "image.png"), ("RGBA", "image.png"), ("P", "image.png")],
        *[
            ("CMYK", "image.tif"),
            ("YCbCr", "image.tif"),
            ("RGBA", "image.webp"),
            ("P", "image.gif"),
        ],
        *[("RGB", "image.jp2"), ("RGB", "image.qoi"), ("RGB", "image.bmp"), ("RGB", "image.ppm")],
    ],
)
def test_other_modes_become_colour_and_grey(tmp_path, mode, name):
    source = Image.fromarray(COLOUR).convert("RGB").convert(mode)
    lossless = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, source, name, **lossless)
    expected = source.convert("RGB")
    difference = np.abs(np.int16(load_image(path)) - np.int16(expected))
    assert difference.max() <= (2 if mode in ("CMYK", "YCbCr") else 0)
    assert load_image(path, "L").mode == "L"


def test_lab_is_converted_by_its_colours(tmp_path):
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    colours = Image.new("RGB", (8, 8), (200, 40, 90))
    lab = ImageCms.applyTransform(colours, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    read = load_image(saved(tmp_path, lab, "image.tif"))
    assert np.abs(np.int16(read) - np.int16(colours)).max() <= 3


def test_palettes_with_transparency_are_read_without_a_warning(tmp_path):
    palette = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    path = saved(tmp_path, palette, transparency=bytes([0, 0, 0] + 200 * [255]))
    assert load_image(path).tobytes() == palette.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.webp"])
def test_images_are_rotated_by_their_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.fromarray(COLOUR), name, exif=exif, **options)
    turned = {
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: COLOUR[::-1].transpose(1, 0, 2),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: COLOUR[:, ::-1].transpose(1, 0, 2),
    }
    np.testing.assert_array_equal(np.asarray(load_image(path)), turned.get(orientation, COLOUR))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage and more",
        b"Exif\0\0MM\0*\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\4\0\0\0abc\0\0\0\0\0",
    ],
    ids=["garbage", "cut", "a word as orientation"],
)
def test_images_with_damaged_metadata_are_read(tmp_path, exif):
    path = saved(tmp_path, Image.fromarray(COLOUR), "image.jpg", exif=exif)
    assert load_image(path).size == (30, 20)


# Files that are refused


def test_postscript_never_reaches_an_interpreter(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    path = tmp_path / "image.png"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("was called"))
    with pytest.raises(
        InputError, match="image.png cannot be read .not an image in one of the form"
    ):
        load_image(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_image(io.BytesIO(path.read_bytes()), name="a.tar/0")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    for name, message in (
        ("pipe.png", "not a regular file"),
        ("link.png", "not a regular file"),
        ("folder.png", "is a folder"),
        ("gone.png", "does not exist"),
    ):
        with pytest.raises(InputError, match=f"{name} .*{message}"):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero is not a regular file"):
        load_image("/dev/zero")
    saved(tmp_path, Image.fromarray(COLOUR))
    (tmp_path / "good.png").symlink_to("image.png")
    assert load_image(tmp_path / "good.png").size == (30, 20)


def test_a_large_image_is_read_and_one_that_is_too_large_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    assert load_image(path).size == (300, 300)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(
        InputError, match="image.png cannot be read .it has more than 0 million pix"
    ):
        load_image(path)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (20001, 2)])
@pytest.mark.parametrize("input_size", [224, (64, 224)])
def test_long_images_need_little_memory(size, input_size):
    image = Image.effect_noise(size, 50).convert("RGB")
    transform = eval_transform(RunConfig(img_size=input_size))
    limit = f"""
import resource
from PIL import Image
from t2tvit.training.config import RunConfig
from t2tvit.training.pipeline import eval_transform
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
eval_transform(RunConfig(img_size={input_size}))(Image.new("RGB", {size}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 * 1024
    height, width = (224, 224) if input_size == 224 else input_size
    assert transform(image).shape == (3, height, width)


@pytest.mark.parametrize("size", [(30, 20), (900, 30), (30, 600), (31, 645)])
@pytest.mark.parametrize("input_size", [32, (32, 48)])
def test_images_of_usual_shapes_are_resized_whole(size, input_size):
    config = RunConfig(img_size=input_size)
    image = Image.effect_noise(size, 50).convert("RGB")
    whole = eval_transform(config).transforms[1]
    assert (eval_transform(config)(image) == whole(image)).all()


def test_the_crop_of_a_long_image_equals_that_of_the_whole():
    image = Image.effect_noise((2000, 4), 50).convert("RGB")
    config = RunConfig(img_size=32)
    difference = (
        eval_transform(config)(image).int() - eval_transform(config).transforms[1](image).int()
    )
    assert difference.abs().max() <= 1


# Folders


@pytest.fixture
def folder(tmp_path):
    """Images with several extensions, and other files."""
    for name in ("b.png", "a.JPE", "c.gif", "d.jfif", "e.WebP", "deep/f.avif", "z.d/g.tiff"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not looked into")
    for name in (
        "._b.png",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "__MACOSX/b.png",
        "@eaDir/b.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "b-checkpoint.png").write_bytes(b"")
    for name in ("report.pdf", "data.h5", "film.mpg", "drawing.eps", "x.HEIC", "y.heic", "README"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def test_images_and_ignored_files_of_a_folder(folder):
    paths, skipped = list_images(folder)
    names = [os.path.relpath(path, folder) for path in paths]
    expected = ["a.JPE", "b.png", "c.gif", "d.jfif", "e.WebP", "deep/f.avif", "z.d/g.tiff"]
    assert names == expected
    line = "7 files skipped: .heic (2), no extension (1), .eps (1), .h5 (1), .mpg (1), .pdf (1)"
    assert describe_skipped(skipped) == line
    assert describe_skipped(Counter()) == ""


def test_linked_folders_are_followed_once(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "h.png").write_bytes(b"")
    (other / "back").symlink_to(folder)
    (folder / "linked").symlink_to(other)
    (folder / "loop").symlink_to(".")
    (folder / "self").symlink_to("self")
    names = [os.path.relpath(path, folder) for path in list_images(folder)[0]]
    assert "linked/h.png" in names and len(names) == 8


def test_class_folders_are_in_the_order_of_their_numbers(tmp_path):
    for name in (".hidden", *map(str, range(12))):
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert list_classes(tmp_path) == [str(number) for number in range(12)]
    (tmp_path / "other").mkdir()
    assert list_classes(tmp_path)[:4] == ["0", "1", "10", "11"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="folder .*gone cannot be read: No such file"):
        list_images(tmp_path / "gone")
