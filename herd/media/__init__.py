"""Images to what an encoder takes."""

from herd.media.image import Image, Tiles, cut, open_image

__all__ = ["Image", "Tiles", "cut", "open_image"]
