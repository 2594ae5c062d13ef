# SPDX-License-Identifier: BSD-3-Clause
"""From image files of every kind to the pixels the model sees."""

from __future__ import annotations

import io
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.predict import decode as decode_module
from resnet_fused.predict.decode import Decoded, decode, torchvision_decoder
from resnet_fused.predict.preprocess import (
    INTERPOLATIONS,
    Preprocessing,
    geometry,
    normalise,
    preprocessing_of,
    resize_and_crop,
)

COLOUR = (200, 100, 50)
EXIF_ORIENTATION = 0x0112
# (37, 50) makes a border of an odd number of pixels at 33/32, where left and right differ by one;
# (3000, 2) is 48,000 wide after the resize; 1x1 has nothing to interpolate.
SIZES = [(37, 50), (50, 37), (64, 64), (1, 1), (500, 375), (3000, 2), (2, 700), (33, 33)]
SMALL = Preprocessing(resize=33, crop=32)


def noise(width: int, height: int, low: int = 0, high: int = 255) -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(low, high + 1, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).int()


def pixels(data: bytes) -> Tensor:
    """The decoded pixels, int32 [H, W, 3], as stored."""
    image = decode(data).pixels
    return image.permute(1, 2, 0).int() if isinstance(image, Tensor) else levels(image)


def as_tensor(image: Image.Image, orientation: int = 1) -> Decoded:
    """What torchvision's decoder would give; tests its way where it is not installed."""
    return Decoded(torch.from_numpy(np.array(image)).permute(2, 0, 1), orientation)


def off(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def png_chunks(header: bytes, data: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png_16_bits_rgb(red: int, green: int, blue: int) -> bytes:
    row = b"\0" + struct.pack(">3H", red, green, blue) * 5
    return png_chunks(struct.pack(">2I5B", 5, 4, 16, 2, 0, 0, 0), row * 4)


# Kind of file, and how far its format itself may move a flat colour.
@pytest.mark.parametrize(
    ("kind", "options", "distance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("GIF", {}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95}, 2),
        ("JPEG", {"quality": 95, "progressive": True}, 2),
    ],
)
def test_file_formats(kind: str, options: dict[str, Any], distance: int) -> None:
    """Breaks if a format is refused, or its channels come in another order."""
    data = encode(Image.new("RGB", (20, 10), COLOUR), kind, **options)
    assert off(pixels(data), levels(Image.new("RGB", (20, 10), COLOUR))) <= distance


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("L", 77, "PNG", (77, 77, 77)),
        ("L", 77, "JPEG", (77, 77, 77)),
        ("LA", (77, 0), "PNG", (77, 77, 77)),
        ("RGBA", (*COLOUR, 0), "PNG", COLOUR),
        ("RGBA", (*COLOUR, 128), "TIFF", COLOUR),
        ("1", 1, "PNG", (255, 255, 255)),
        ("I;16", 0x80FF, "PNG", (0x80, 0x80, 0x80)),
        ("I;16", 0xFFFF, "TIFF", (255, 255, 255)),
        ("I;16", 0x1234, "PPM", (0x12, 0x12, 0x12)),
        ("I", 0x4321, "TIFF", (0x43, 0x43, 0x43)),
    ],
)
def test_modes_become_rgb(
    mode: str, colour: Any, kind: str, expected: tuple[int, int, int]
) -> None:
    """Breaks if alpha darkens the colour below it, or 16 bits are clipped at 255, not shifted."""
    data = encode(Image.new(mode, (5, 4), colour), kind)
    assert off(pixels(data), levels(Image.new("RGB", (5, 4), expected))) == 0


def test_16_bit_colour() -> None:
    """Breaks if the low byte is taken; Pillow cannot write this kind, so it is made by hand."""
    expected = levels(Image.new("RGB", (5, 4), (0x12, 0xFF, 0x80)))
    assert off(pixels(png_16_bits_rgb(0x12FF, 0xFF00, 0x8001)), expected) == 0


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128])])
def test_palette(transparency: Any) -> None:
    """Breaks if palette indices are taken for levels, or transparent entries lose their colour."""
    image = Image.new("P", (5, 4), 1)
    image.putpalette([9, 9, 9, *COLOUR])
    options = {} if transparency is None else {"transparency": transparency}
    expected = levels(Image.new("RGB", (5, 4), COLOUR))
    assert off(pixels(encode(image, "PNG", **options)), expected) == 0


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    """Breaks if CMYK is inverted (Adobe writes JPEG so) or read as RGBA."""
    image = Image.new("CMYK", (16, 16), (0, 128, 200, 20))  # a dark orange
    expected = levels(image.convert("RGB"))
    assert expected[0, 0, 0] > 200 > 150 > expected[0, 0, 1] > 100 > expected[0, 0, 2]
    assert off(pixels(encode(image, kind)), expected) <= 3


def test_first_frame_of_an_animation() -> None:
    """Breaks if another frame, or all of them, are taken."""
    frames = [Image.new("RGB", (5, 4), COLOUR), Image.new("RGB", (5, 4), (0, 0, 255))]
    for kind in ("GIF", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert off(pixels(data), levels(frames[0])) == 0


def jpeg() -> bytes:
    return encode(noise(64, 48), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", ValueError, "empty file"),
        (b"this is no picture", ValueError, "no image in a format"),
        (jpeg()[:200], (OSError, ValueError), None),
        (jpeg()[:-300], OSError, "truncated"),
        (encode(noise(64, 48), "PNG")[:-3000], OSError, "truncated|broken"),
        (
            png_chunks(struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0), b""),
            Image.DecompressionBombError,
            "3600000000 pixels",
        ),
        (encode(Image.new("F", (5, 4), 0.5), "TIFF"), ValueError, "no defined range"),
        (encode(Image.new("I", (5, 4), 1 << 20), "TIFF"), ValueError, "no defined range"),
    ],
    ids=["empty", "text", "header-only", "cut-jpeg", "cut-png", "bomb", "float", "32-bit"],
)
def test_damaged_files_are_errors(data: bytes, error: Any, message: str | None) -> None:
    """Breaks if half an image is filled with grey, or a number range is guessed."""
    with pytest.raises(error, match=message):
        decode(data)


@pytest.mark.parametrize("tag", [0, 9, 65535])
def test_orientation_that_does_not_exist_is_ignored(tag: int) -> None:
    """Breaks if a nonsense tag, which some cameras write, fails the image."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = tag
    assert decode(encode(noise(8, 6), "JPEG", exif=exif)).orientation == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored() -> None:
    """Breaks if an EXIF block cut in the middle fails an image whose pixels are whole."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    damaged = b"Exif\0\0MM\0*\xff\xff\xff\xff" + exif.tobytes()[14:]
    assert decode(encode(noise(8, 6), "JPEG", exif=damaged)).orientation == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """Breaks if an orientation is applied wrongly, twice (TIFF), or after an uneven crop."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    for size in ((37, 50), (50, 37)):
        data = encode(noise(*size), kind, exif=exif)
        stored = Image.open(io.BytesIO(data))
        upright = ImageOps.exif_transpose(stored).convert("RGB")
        expected = resize_and_crop(Decoded(upright, 1), SMALL)
        assert off(resize_and_crop(decode(data), SMALL), expected) <= 1
        if kind == "JPEG":
            turned = resize_and_crop(as_tensor(stored, orientation), SMALL)
            assert off(turned, expected) <= 1


@pytest.mark.parametrize(
    ("size", "resize", "crop", "whole", "corner"),
    [
        ((500, 375), 256, 224, (341, 256), (58, 16)),  # 341.3; 58.5, half to even
        ((375, 500), 256, 224, (256, 341), (16, 58)),
        ((640, 427), 232, 224, (347, 232), (62, 4)),  # 347.7 is cut; 61.5, half to even
        ((1, 1), 256, 224, (256, 256), (16, 16)),
        ((3000, 2), 256, 224, (384000, 256), (191888, 16)),
    ],
)
def test_sizes_are_rounded_as_by_torchvision(
    size: tuple[int, int],
    resize: int,
    crop: int,
    whole: tuple[int, int],
    corner: tuple[int, int],
) -> None:
    """Breaks if the longer side is rounded and not cut, or the crop is half a pixel elsewhere."""
    left, top = corner
    box = (left, top, left + crop, top + crop)
    assert geometry(*size, Preprocessing(resize=resize, crop=crop)) == (whole, box)


def float_order(image: Image.Image, prep: Preprocessing) -> Tensor:
    """The usual order without any rounding: to float64, resize, crop; levels 0 to 255."""
    (width, height), (left, top, _, _) = geometry(*image.size, prep)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()[None]
    y = F.interpolate(x, size=(height, width), mode=prep.interpolation, antialias=True)[0]
    return y[:, top : top + prep.crop, left : left + prep.crop].permute(1, 2, 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prep", [SMALL, Preprocessing(resize=33, crop=33)], ids=["32", "33"])
def test_pixels_are_within_one_level_of_the_float_order(
    size: tuple[int, int], prep: Preprocessing
) -> None:
    """Breaks if resizing in uint8, or only the part that is kept, moves or rounds anything else.

    Each of the two passes rounds once, to within half a level, and the second averages the first.
    """
    image = noise(*size)
    expected = float_order(image, prep).round()
    for decoded in (Decoded(image, 1), as_tensor(image)):
        assert off(resize_and_crop(decoded, prep), expected) <= 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_equal_the_usual_order_in_pillow(size: tuple[int, int], interpolation: str) -> None:
    """Breaks if the crop is cut from another place than after a resize of the whole image, as
    torchvision's presets do it on Pillow images.

    Middle levels only: bicubic overshoots, and what is clipped between its two passes depends on
    which comes first.
    """
    prep = Preprocessing(resize=33, crop=32, interpolation=interpolation)
    image = noise(*size, 64, 191)
    whole, box = geometry(*size, prep)
    expected = levels(image.resize(whole, INTERPOLATIONS[interpolation]).crop(box))
    for decoded in (Decoded(image, 1), as_tensor(image)):
        assert off(resize_and_crop(decoded, prep), expected) <= 1


def test_normalise_equals_the_usual_formula() -> None:
    """Breaks if a channel takes another's mean, or the rounding to bf16 happens before the end."""
    levels = torch.arange(256, dtype=torch.uint8).view(2, 16, 8, 1).expand(2, 16, 8, 3)
    prep = Preprocessing()
    x = levels.permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (prep.mean, prep.std))
    expected = (x - mean) / std
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = normalise(levels, prep, dtype)
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)
        # One rounding to dtype, and 4 in fp32 on magnitudes of at most 4.3 / 0.22.
        bound = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6
        assert ((result.double() - expected).abs() <= bound).all()


def test_preprocessing_comes_from_the_weights_and_flags_override() -> None:
    """Breaks if 256/224 is used for weights that say otherwise, or the origin is not told."""
    preset = SimpleNamespace(
        resize_size=[232],
        crop_size=[208],
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        interpolation=SimpleNamespace(value="bicubic"),
    )

    class Weights:
        def transforms(self) -> Any:
            return preset

        def __str__(self) -> str:
            return "V2"

    assert preprocessing_of(Weights()) == Preprocessing(
        232, 208, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "from V2"
    )
    changed = preprocessing_of(Weights(), crop=100, resize=None)
    assert (changed.resize, changed.crop) == (232, 100)
    assert changed.origin == "from V2, except crop as given"
    assert preprocessing_of("file.pth") == Preprocessing(256, 224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 257}, "crop must be from 1 to resize .256., got 257"),
        ({"crop": 0}, "got 0"),
        ({"interpolation": "nearest"}, "bilinear or bicubic, got nearest"),
        ({"mean": (0.5,)}, "mean must have 3 values, got 1"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be above 0"),
    ],
)
def test_preprocessing_refuses_nonsense(fields: dict[str, Any], message: str) -> None:
    """Breaks if a crop larger than the image pads, or a zero std divides."""
    with pytest.raises(ValueError, match=message):
        preprocessing_of(None, **fields)


def test_without_torchvision_or_with_a_broken_one_pillow_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Breaks if a torchvision that is absent or made for another torch stops predict."""
    for error in (ImportError("absent"), RuntimeError("operator torchvision::nms does not exist")):

        def fail(name: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(decode_module.importlib, "import_module", fail)
        torchvision_decoder.cache_clear()
        assert torchvision_decoder() is None
        assert isinstance(decode(jpeg()).pixels, Image.Image)
    torchvision_decoder.cache_clear()


def test_torchvision_decodes_what_is_plain_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a file that torchvision reads differently (truncated, CMYK, grey, a long strip),
    or refuses, is not left to Pillow."""
    marker = torch.zeros(3, 48, 64, dtype=torch.uint8)
    monkeypatch.setattr(decode_module, "torchvision_decoder", lambda: lambda data: marker)
    assert decode(jpeg()).pixels is marker
    others = [
        jpeg() + b"trailer",
        encode(Image.new("L", (8, 8)), "JPEG"),
        encode(Image.new("CMYK", (8, 8)), "JPEG"),
        encode(noise(100, 10), "JPEG"),
        encode(noise(8, 8), "PNG"),
    ]
    assert all(isinstance(decode(data).pixels, Image.Image) for data in others)

    def refuse(data: Tensor) -> Tensor:
        raise RuntimeError("unsupported")

    monkeypatch.setattr(decode_module, "torchvision_decoder", lambda: refuse)
    assert isinstance(decode(jpeg()).pixels, Image.Image)


def test_torchvision_decoder_gives_the_pixels_of_pillow() -> None:
    """Breaks if the two JPEG decoders differ, so that results depend on what is installed."""
    pytest.importorskip("torchvision")
    decoder = torchvision_decoder()
    assert decoder is not None
    for data in (jpeg(), encode(noise(101, 67), "JPEG", progressive=True, subsampling=2)):
        theirs = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)
        assert off(theirs, levels(Image.open(io.BytesIO(data)))) <= 1


@pytest.mark.parametrize(("name", "resize"), [("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232)])
def test_torchvision_presets(name: str, resize: int) -> None:
    """Breaks if a torchvision preset is not read, or gives other pixels than torchvision itself."""
    weights = pytest.importorskip("torchvision.models").ResNet50_Weights[name]
    prep = preprocessing_of(weights)
    assert (prep.resize, prep.crop) == (resize, 224)
    image = noise(500, 375)
    ours = normalise(resize_and_crop(Decoded(image, 1), prep)[None], prep, torch.float32)[0]
    one_level = 1 / 255 / min(prep.std)
    assert off(ours, weights.transforms()(image)) <= 1.001 * one_level
