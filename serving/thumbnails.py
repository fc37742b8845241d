"""The small copies of images that serve.py shows."""
import io
from pathlib import Path

from common.files import image_file
from common.images import load_image

THUMBNAIL_SIDE = 320  # px
THUMBNAIL_QUALITY = 80  # of JPEG


def make_thumbnail(folder: str, path: str) -> bytes:
    """Return an image below a folder as a small JPEG; raises BrokenImage, or UserError for a link out of the folder."""
    image = load_image(image_file(Path(folder), path))
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.info.clear()  # else the file's comment would be written, which fails above 64 KB
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
