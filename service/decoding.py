"""From the bytes of a request to one image of the network's size. Every bound on what may come in is here.

Must not know of deadlines or queues. Nothing is decoded before its size is known to be within bounds.
"""

import asyncio
import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, create_form_parser

from service import containers
from service.errors import Malformed, TooLarge, UnsupportedType

FORMATS = ("PNG", "JPEG", "WEBP")
RAW_TYPE = "application/octet-stream"
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
TYPES = (*IMAGE_TYPES, "multipart/form-data", RAW_TYPE, "application/json")

INLINE_BYTES = 32 * 1024
INLINE_PIXELS = 128 * 128
"""Smaller pictures are decoded on the event loop. A 32 x 32 PNG takes some 0.1 ms and a hop to a thread and
back 0.05 to 0.1 ms; at these bounds a picture takes about half a millisecond, the longest the loop should
stand still."""

JPEG_SCALE_MARGIN = 4
"""A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, at least this many times the network's: those scales
are block means too, so the box filter's answer hardly moves, and a 12-megapixel photograph decodes several
times faster."""

TURNS: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What Exif's orientations ask for."""

BLENDED_PIXELS = 1 << 17
"""Laid on white at a time, for a millisecond."""

JSON_IMAGE = re.compile(rb'\s{0,8}\{\s{0,8}"image"\s{0,8}:\s{0,8}"')
"""How the JSON with a picture begins."""

MAX_FIELDS = 100
"""Of a form, one of which is the picture. Each takes 6 us, and one has 50 bytes."""

COUNTED_BYTES = 1 << 16
BASE64_LENGTH = 1 << 18
"""Taken at a time: 0.1 and 0.7 ms, for which the interpreter is held."""

# What Pillow has to say about a stranger's file is nothing for the log, and Python remembers each wording.
warnings.filterwarnings("ignore", module=r"PIL\.")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A picture whose header has been read, its number of pixels, and its orientation as Exif has it."""

    image: Image.Image
    n_pixels: int
    orientation: int


class Decoder:
    """Turns request bodies into images of one size.

    Args:
        height: Of the network's input.
        width: Of the network's input.
        max_pixels: Largest picture, judged by its header.
        max_decoded_pixels: Largest one to decode, judged by its header and by how far it can be scaled down
            while it is decoded.
        max_values: In a body of JSON.
        threads: Decodes large pictures.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        max_pixels: int,
        max_decoded_pixels: int,
        max_values: int,
        threads: Executor,
    ) -> None:
        self._height = height
        self._width = width
        self._max_pixels = max_pixels
        self._max_decoded_pixels = max_decoded_pixels
        self._max_values = max_values
        self._threads = threads

    async def decode(self, content_type: str, body: bytes) -> NDArray[np.uint8]:
        """Make the image_HWC that a body describes.

        Raises:
            UnsupportedType: the Content-Type, or what is really inside, is none of `TYPES`.
            Malformed: the body is not what its Content-Type says, or the picture is cut short.
            TooLarge: the picture has too many pixels.

        Cost: about 0.1 ms for a 32 x 32 PNG; large pictures keep the event loop free.
        """
        media_type = _media_type(content_type)
        if media_type == RAW_TYPE:
            return self._raw(body)
        is_small = len(body) <= INLINE_BYTES
        opened = await self._do(is_small, lambda: self._open(media_type, content_type, body))
        is_small = is_small and opened.n_pixels <= INLINE_PIXELS
        return await self._do(is_small, lambda: self._fit(opened))

    def decode_raw(self, content_type: str, body: bytes) -> NDArray[np.uint8] | None:
        """As `decode`, at once, for raw pixels; None for everything else.

        Raises:
            Malformed: these are not as many bytes as the network's input.
        """
        return self._raw(body) if _media_type(content_type) == RAW_TYPE else None

    async def _do(self, is_small: bool, work: Callable[[], Result]) -> Result:
        return work() if is_small else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _raw(self, body: bytes) -> NDArray[np.uint8]:
        shape = (self._height, self._width, 3)
        if len(body) != math.prod(shape):
            raise Malformed(
                f"Raw pixels must be exactly {self._height} x {self._width} x 3 = {math.prod(shape)} bytes, "
                f"row by row, but {len(body)} came: resize the picture or send it as PNG, JPEG or WebP."
            )
        return np.frombuffer(body, np.uint8).reshape(shape)

    def _open(self, media_type: str, content_type: str, body: bytes) -> _Opened:
        """Read the header only: format and size are known, no pixel is."""
        if media_type == "multipart/form-data":
            body = _multipart_image(content_type, body)
        elif media_type == "application/json":
            body = _json_image(body, self._max_values)
        elif media_type not in IMAGE_TYPES:
            raise UnsupportedType(
                f"Content-Type is {media_type or 'missing'}: use one of {', '.join(TYPES)}."
            )
        if not body:
            raise Malformed("The picture is empty: send the bytes of a PNG, JPEG or WebP file.")
        picture = containers.stripped(body)
        try:
            image = Image.open(io.BytesIO(picture.file), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise UnsupportedType("The content is no PNG, JPEG or WebP: convert it.") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TooLarge(f"The picture has more than {self._max_pixels} pixels: scale it down.") from error
        except Exception as error:  # Pillow raises many kinds for a damaged header
            raise Malformed(f"The picture's header cannot be read ({error}): send the file whole.") from error
        n_pixels = image.width * image.height
        if n_pixels > self._max_pixels:
            raise TooLarge(
                f"The picture is {image.width} x {image.height}; at most {self._max_pixels} pixels "
                "are taken: scale it down."
            )
        if isinstance(image, JpegImageFile):
            margin = JPEG_SCALE_MARGIN * max(self._height, self._width)
            scale = margin / min(image.size)
            image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        if image.width * image.height > self._max_decoded_pixels:
            raise TooLarge(
                f"The picture would be decoded to {image.width} x {image.height}; at most "
                f"{self._max_decoded_pixels} pixels are: scale it down, or send a JPEG."
            )
        return _Opened(image, n_pixels, picture.orientation)

    def _fit(self, opened: _Opened) -> NDArray[np.uint8]:
        """Decode, orient, and bring the largest centred part of the network's shape to its size."""
        try:
            opened.image.load()
            image = _as_rgb(opened.image)
        except Exception as error:  # Pillow raises many kinds for damaged content
            raise Malformed(f"The picture cannot be decoded ({error}): send the file whole.") from error
        if opened.orientation in TURNS:
            image = image.transpose(TURNS[opened.orientation])
        if image.size != (self._width, self._height):
            scale = min(image.width / self._width, image.height / self._height)
            crop_width, crop_height = self._width * scale, self._height * scale
            left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
            image = image.resize(
                (self._width, self._height),
                Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC,
                box=(left, top, left + crop_width, top + crop_height),
            )
        return np.asarray(image)


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _as_rgb(image: Image.Image) -> Image.Image:
    """In parts where that is slow: Pillow holds the interpreter while it lays one picture on another."""
    is_grey_16 = image.mode.startswith("I")
    if not (is_grey_16 or image.has_transparency_data):
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    height = max(1, BLENDED_PIXELS // image.width)
    for top in range(0, image.height, height):
        part = image.crop((0, top, image.width, min(top + height, image.height)))
        rgb.paste(_upper_byte(part) if is_grey_16 else _on_white(part), (0, top))
    return rgb


def _upper_byte(grey: Image.Image) -> Image.Image:
    """Of 16 bits, which Pillow would clip to white."""
    return Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def loads(body: bytes, max_values: int) -> Any:
    """Parse JSON, if there are not more values in it than may be made of it.

    Parsing holds the interpreter for 30 to 100 ns a value, a thread of its own does not help, and a value may
    have two bytes.

    Args:
        body: The document.
        max_values: Counted are its commas, colons and opening brackets, those in texts, too: it has no more
            values, and hardly fewer.

    Raises:
        TooLarge: it has more of them.
        orjson.JSONDecodeError: it is no JSON.

    Cost: 2 ns a byte, and those of the values.
    """
    n_values = 0
    for at in range(0, len(body), COUNTED_BYTES):  # in parts, so that others have their turn in between
        part = body[at : at + COUNTED_BYTES]
        n_values += len(part) - len(part.translate(None, b",:[{"))
        if n_values > max_values:
            raise TooLarge(
                f"The JSON has more than {max_values} values: send pixels as a binary tensor, or as a file."
            )
    return orjson.loads(body)


def from_base64(text: str | memoryview) -> bytes:
    """The bytes that a text stands for.

    Raises:
        ValueError: it is no base64.

    Cost: 2 to 3 ns a character; others have their turn in between.
    """
    parts = list[bytes]()
    for at in range(0, len(text), BASE64_LENGTH):
        if parts and len(parts[-1]) != BASE64_LENGTH // 4 * 3:
            raise ValueError("Excess data after padding")
        parts.append(base64.b64decode(text[at : at + BASE64_LENGTH], validate=True))
    return b"".join(parts)


def _json_image(body: bytes, max_values: int) -> bytes:
    example = '{"image": "<base64 of a PNG, JPEG or WebP file>"}'
    try:
        document = _plain_json(body) or loads(body, max_values)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is no JSON ({error}): send {example}.") from error
    if (
        not isinstance(document, dict)
        or document.keys() != {"image"}
        or not isinstance(document["image"], str | memoryview)
    ):
        raise Malformed(f"The JSON must have the one field `image`, a string: send {example}.")
    try:
        return from_base64(document["image"])
    except ValueError as error:
        raise Malformed(f"`image` is no base64 ({error}): send {example}.") from error


def _plain_json(body: bytes) -> dict[str, memoryview] | None:
    """What JSON says if it is `{"image": "…"}` without escapes; None if it is something else.

    Parsing would hold the interpreter for 1 ns a byte, and this takes 0.1.
    """
    begins = JSON_IMAGE.match(body)
    start, end = begins.end() if begins else len(body), body.rfind(b'"')
    if end < start or body[end + 1 :].strip() != b"}":
        return None
    if body.find(b'"', start, end) >= 0 or body.find(b"\\", start, end) >= 0:
        return None
    return {"image": memoryview(body)[start:end]}


def _multipart_image(content_type: str, body: bytes) -> bytes:
    found: list[bytes] = []
    n_fields = 0

    def count() -> None:
        nonlocal n_fields
        n_fields += 1
        if n_fields > MAX_FIELDS:
            raise TooLarge(f"The form has more than {MAX_FIELDS} fields: send the picture alone.")

    def take_file(part: File) -> None:
        count()
        if part.field_name == b"image":
            part.file_object.seek(0)
            found.append(part.file_object.read())

    def take_field(part: Field) -> None:
        count()
        if part.field_name == b"image":
            found.append(part.value or b"")

    headers = {"Content-Type": content_type.encode("latin-1")}
    never_on_disk = {"MAX_MEMORY_FILE_SIZE": len(body)}
    try:
        parser = create_form_parser(headers, take_field, take_file, never_on_disk)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise Malformed(
            f"The form cannot be read ({error}): send multipart/form-data with a boundary."
        ) from error
    if len(found) != 1:
        raise Malformed(
            f"The form has {len(found)} fields `image` where one is needed: try curl -F image=@cat.jpg."
        )
    return found[0]
