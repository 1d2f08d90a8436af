"""Readers of images, text and tables: what they make of unusual files, and that each message names the place."""

import codecs
import gzip
import io
import json
import pickle
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from lightning_adam_mini.tasks.data.sources import read_image
from lightning_adam_mini.tasks.diffusion.data.celeba import read_partition
from lightning_adam_mini.tasks.diffusion.data.sources import ImageFiles
from lightning_adam_mini.tasks.graph.data.citations import Planetoid, read_table
from lightning_adam_mini.tasks.llm.data import HFText, TextFiles
from lightning_adam_mini.tasks.vision.data import FashionMnist, ImageFolders, TorchvisionData
from tiny_images import write_cifar10, write_fashion, write_tree

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def half_and_half():
    """4 rows of 8 pixels: red on the left, blue on the right."""
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image


def corners(image):
    """The first and the last pixel."""
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


def oriented(number):
    notes = Image.Exif()
    notes[0x112] = number
    return notes


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize(
    ("orientation", "first", "last"), [(1, RED, BLUE), (3, BLUE, RED), (6, RED, BLUE), (8, BLUE, RED)]
)
def test_photographs_stand_upright(tmp_path, suffix, orientation, first, last):
    path = tmp_path / f"a.{suffix}"
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    half_and_half().save(path, exif=oriented(orientation), **lossless)
    image = read_image(path)
    assert image.size == ((4, 8) if orientation > 4 else (8, 4))
    np.testing.assert_allclose(corners(image), (first, last), atol=4)


def test_classifiers_and_diffusion_models_see_the_same_upright_image(tmp_path):
    write_tree(tmp_path, {part: {"ant": 1, "bee": 1} for part in ("train", "val")})
    for path in tmp_path.rglob("*.jpg"):
        half_and_half().rotate(90, expand=True).save(path, exif=oriented(6), quality=100, subsampling=0)
    folders, files = ImageFolders(root=str(tmp_path)), ImageFiles(path=str(tmp_path), image_size=4)
    for data in (folders, files):
        data.setup()
    np.testing.assert_allclose(corners(folders.part("train")[0]), (RED, BLUE), atol=4)
    scaled = files.real_images("train", 1)[0].add(1).mul(127.5)  # the middle, whose left half is red
    np.testing.assert_allclose((scaled[:, 0, 0], scaled[:, 3, 3]), (RED, BLUE), atol=4)


@pytest.mark.parametrize("notes", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0"])
def test_damaged_notes_beside_good_pixels_are_no_error(tmp_path, notes, recwarn):
    half_and_half().save(tmp_path / "a.jpg", exif=notes, quality=100, subsampling=0)
    np.testing.assert_allclose(corners(read_image(tmp_path / "a.jpg")), (RED, BLUE), atol=4)
    assert not recwarn.list


def _alpha(mode, alpha):
    image = half_and_half().convert(mode)
    image.putalpha(alpha)
    return image, {}


def _palette():
    image = half_and_half().quantize(4)
    return image, {"transparency": image.getpixel((0, 0))}


@pytest.mark.parametrize(
    ("name", "make", "first"),
    [
        ("rgba.png", lambda: _alpha("RGB", 0), WHITE),
        ("rgba.webp", lambda: _alpha("RGB", 0), WHITE),
        ("half.png", lambda: _alpha("RGB", 128), (255, 127, 127)),
        ("grey.png", lambda: _alpha("L", 0), WHITE),
        ("palette.png", _palette, WHITE),
        ("palette.gif", _palette, WHITE),
        ("colour.png", lambda: (half_and_half(), {"transparency": RED}), WHITE),
        ("one_bit.png", lambda: (Image.new("1", (8, 4)), {"transparency": 0}), WHITE),
        ("opaque.png", lambda: _alpha("RGB", 255), RED),
    ],
)
def test_what_is_transparent_shows_white(tmp_path, name, make, first):
    image, options = make()
    image.save(tmp_path / name, **options)
    assert read_image(tmp_path / name).getpixel((0, 0)) == first
    assert read_image(tmp_path / name, "L").getpixel((0, 0)) == Image.new("RGB", (1, 1), first).convert("L").getpixel(
        (0, 0)
    )


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_the_first_frame_counts(tmp_path, name):
    lossless = {"lossless": True} if name == "a.webp" else {}
    half_and_half().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (8, 4), "green")], **lossless)
    assert corners(read_image(tmp_path / name)) == (RED, BLUE)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "CMYK"), ("a.tiff", "CMYK"), ("a.jpg", "YCbCr"), ("a.tiff", "LAB")]
)
def test_other_colour_spaces(tmp_path, name, mode):
    grey = Image.new(mode, (4, 4), {"CMYK": (0, 0, 0, 128), "YCbCr": (128, 128, 128), "LAB": (137, 128, 128)}[mode])
    grey.save(tmp_path / name)
    np.testing.assert_allclose(read_image(tmp_path / name).getpixel((0, 0)), (128, 128, 128), atol=6)


def png(chunks):
    """A PNG of some chunks, with right checksums."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width, height, depth=8, colour=2):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def test_of_sixteen_bits_the_upper_eight_count_in_colour_and_grey_is_refused(tmp_path):
    pixel = struct.pack(">HHH", 0xFF01, 0x80FE, 0x0100)
    (tmp_path / "colour.png").write_bytes(
        png([header(1, 1, 16), (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b"")])
    )
    assert read_image(tmp_path / "colour.png").getpixel((0, 0)) == (0xFF, 0x80, 0x01)
    Image.fromarray(np.full((2, 2), 60000, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*grey\.png: it has more than 8 bits a channel"):
        read_image(tmp_path / "grey.png")


def _encoded(suffix):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "bomb.png",
            lambda: png([header(13_500, 13_500, 1, 0), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]),
        ),
        ("cut.png", lambda: _encoded("png")[:900]),
        ("cut.jpg", lambda: _encoded("jpeg")[:300]),
        ("cut.webp", lambda: _encoded("webp")[:300]),
        ("cut.gif", lambda: _encoded("gif")[:300]),
        ("cut.bmp", lambda: _encoded("bmp")[:60]),
        ("cut.tiff", lambda: _encoded("tiff")[:100]),
        ("checksum.png", lambda: _encoded("png").replace(b"IDAT", b"IDAU")),
        ("chunk.png", lambda: png([header(1, 1), (b"\0\xff##", b"")])),
        ("deflate.png", lambda: png([header(4, 4), (b"IDAT", b"no deflate"), (b"IEND", b"")])),
        ("header.png", lambda: png([(b"IHDR", b"\0\0")])),
        ("text.jpg", lambda: b"<html>404</html>"),
        ("empty.png", lambda: b""),
        ("nulls.tiff", lambda: b"II*\0" + b"\0" * 40),
        ("ppm.ppm", lambda: b"P6 x y 255\n"),
    ],
)
def test_a_damaged_image_is_one_line_with_its_path(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(
        ValueError, match=rf"^cannot read the image .*/{name}: .+; replace the file, or remove it$"
    ) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_whatever_a_decoder_raises_is_told_with_the_path(tmp_path, monkeypatch):
    half_and_half().save(tmp_path / "a.png")
    for error in (
        struct.error("unpack"),
        zlib.error("stream"),
        MemoryError(),
        OverflowError("large"),
        KeyError("mode"),
        AssertionError(),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        with pytest.raises(ValueError, match=r"cannot read the image .*a\.png: \w+"):
            read_image(tmp_path / "a.png")


def damaged(content, how):
    return {"cut": content[: len(content) // 2], "empty": b"", "other": b"\x00\xff" * 50}[how]


@pytest.mark.parametrize("how", ["cut", "empty", "other"])
def test_damaged_sets_of_images_are_one_line_with_their_place(tmp_path, monkeypatch, how):
    write_fashion(tmp_path / "fashion")
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        path = tmp_path / "fashion" / name
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, how))
        with pytest.raises(ValueError, match=name.removesuffix(".gz")) as caught:
            FashionMnist(path=str(tmp_path / "fashion")).setup()
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    write_cifar10(tmp_path / "cifar", monkeypatch)
    path = tmp_path / "cifar/cifar-10-batches-py/data_batch_3"
    path.write_bytes(damaged(path.read_bytes(), how))
    for check in (True, False):  # torchvision compares sums first
        if not check:
            monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        with pytest.raises(ValueError, match=r"cannot read CIFAR10 \(.+\): data\.root = .*cifar must ") as caught:
            TorchvisionData(name="CIFAR10", root=str(tmp_path / "cifar")).setup()
        assert "\n" not in str(caught.value)


def read_texts(kind, path, **options):
    return [text for _, text in kind(path=str(path), **options).documents()]


BOM = codecs.BOM_UTF8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"one\n<|endoftext|>\ntwo"),
        ("a.csv", b"one<|endoftext|>two"),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]).encode()),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.ndjson", b'{"text": "one"}\r\n\r\n{"text": "two"}'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(BOM + content)
    assert sorted(read_texts(TextFiles, tmp_path / name)) == ["one", "two"]


SURROGATE = json.dumps({"text": "a\ud800b"}).encode()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"one\ntwo\nthr\xffee", r"a\.txt is not UTF-8 text \(byte 11\) in line 3"),
        ("a.txt", b"one\ntw\0o", r"Line 2 of .*a\.txt contains a NUL"),
        ("a.txt", "one\ntwo".encode("utf-16"), r"a\.txt is not UTF-8 text \(byte 0\) in line 1"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + SURROGATE,
            r"line 2 of .*a\.jsonl contains a lone surrogate \(\\ud800 at character 1\)",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl is not UTF-8 text \(byte 10\) in line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "a\\u0000"}', r"line 3 of .*a\.jsonl contains a NUL"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\0"}', r"line 2 of .*a\.jsonl is not JSON \(Invalid control"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"line 2 of .*a\.jsonl is not a record but a list"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}', r"line 2 of .*a\.jsonl has no text in 'text': set .* one of 'txt'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', r"line 2 of .*a\.jsonl has no text in 'text'"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"line 2 of .*a\.jsonl is not JSON"),
        (
            "a.json",
            b'[{"text": "x"},\n\n' + SURROGATE + b"]",
            r"record 2 of .*a\.json contains a lone surrogate .* line 3\.",
        ),
        (
            "a.json",
            b'[{"text": "a, [b"},\n{"text": "y"},\n 7]',
            r"record 3 of .*a\.json is not a record .* begins on line 3\.",
        ),
        ("a.json", b'[{"text": "x"},\n{"text": "\xff"}]', r"a\.json is not UTF-8 text \(byte 26\) in line 2"),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', r"a\.json is not JSON \(.*line 2"),
        ("a.json", b"[" * 100_000, r"a\.json is not JSON"),
    ],
)
def test_text_that_is_none_is_told_with_file_and_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        read_texts(TextFiles, tmp_path / name)
    assert "\n" not in str(caught.value)


def _invalid_text(path):
    rows = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": rows}), path)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (_invalid_text, r"row 2 of .*a\.parquet is not UTF-8 text"),
        (lambda path: pq.write_table(pa.table({"text": ["x", "a\0"]}), path), r"row 2 of .*a\.parquet contains a NUL"),
        (
            lambda path: pq.write_table(pa.table({"text": [["x"]]}), path),
            r"a\.parquet contains a list, not only text \(row 1\)",
        ),
        (lambda path: path.write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1"), r"Cannot read .*a\.parquet"),
        (lambda path: path.write_bytes(b""), r"Cannot read .*a\.parquet"),
    ],
)
def test_rows_that_are_no_text_are_told_with_file_and_row(tmp_path, write, told):
    write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=told) as caught:
        read_texts(HFText, tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_pages_of_a_parquet_file_that_are_damaged(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {number}" for number in range(3000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:2000] = b"\xff" * 1800
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Cannot read .*a\.parquet \(.+\): it is damaged"):
        read_texts(HFText, path)


@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00001.arrow", "dataset_info.json"])
def test_saved_data_sets_that_are_damaged(tmp_path, name):
    datasets.Dataset.from_dict({"text": ["a"] * 50}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_bytes(b"{" * 40)
    with pytest.raises(ValueError, match=r"Cannot read .*saved \(.+\): it is damaged"):
        read_texts(HFText, tmp_path / "saved")


def test_tables_of_graphs(tmp_path):
    path = tmp_path / "edge.csv.gz"
    path.write_bytes(gzip.compress(BOM + b"0,1\n1,2\n"))
    assert read_table(path, np.int64, 2).tolist() == [[0, 1], [1, 2]]
    for content in (b"0,1\n1,x\n", b"0,1\n1,99999999999999999999999\n", b"0,1\n1,\xff\n", b"0,1\n1\n"):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"edge\.csv\.gz: .*(row 1|row 2|2)") as caught:
            read_table(path, np.int64, 2)
        assert "\n" not in str(caught.value)


def test_the_partition_of_faces(tmp_path):
    (tmp_path / "list_eval_partition.txt").write_bytes(BOM + b"000001.jpg 0\r\n000002.jpg 1\r\n")
    assert read_partition(tmp_path, ["000001.jpg", "000002.jpg"]) == {"000001.jpg": 0, "000002.jpg": 1}


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({"a": 1}), b"\xff" * 40])
def test_pickles_of_graphs(tmp_path, content):
    for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        (tmp_path / f"ind.cora.{part}").write_bytes(content)
    with pytest.raises(ValueError, match=r"Cora in .*: the files cannot be read \(\w+") as caught:
        Planetoid(path=str(tmp_path), cache_dir=str(tmp_path / "cache")).setup()
    assert "\n" not in str(caught.value)


def test_a_damaged_image_ends_training_before_it_begins(tmp_path):
    write_tree(tmp_path, {part: {"ant": 2} for part in ("train", "val")})
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(png([header(13_500, 13_500, 1, 0)]))
    files = ImageFiles(path=str(tmp_path), image_size=4, check_files=True)
    with pytest.raises(ValueError, match=r"cannot read the image .*\.jpg: "):
        files.setup()
