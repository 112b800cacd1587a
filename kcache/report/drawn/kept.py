"""What is kept of a picture around a hole: its own pixels, rather than MoVQ's copy of them."""

import numpy as np
from PIL import Image, ImageFilter

from kcache.encoders.pixels import WHITE
from kcache.loader.masks import grow


def kept_latents(hole: Image.Image, downsampling: int) -> np.ndarray:
    """Which latents a pipeline keeps beside a hole of greys, white where it is drawn: (h, w) float32, 1 is kept."""
    return grow((np.asarray(hole)[::downsampling, ::downsampling] < WHITE).astype(np.float32))


def put_back(drawn: Image.Image, picture: Image.Image, hole: Image.Image, downsampling: int) -> Image.Image:
    """`drawn` in the hole as the pipeline grows it, and the pixels of `picture` around: all RGB, and of one size.

    `hole` is of greys, white where the picture was drawn anew; `downsampling` is MoVQ's. From the grown hole's edge the
    one passes into the other evenly, over the width of a latent pixel: there both show the same, MoVQ's error aside.
    """
    grown = np.where(kept_latents(hole, downsampling) > 0, np.uint8(0), np.uint8(255))
    pixels = Image.fromarray(grown.repeat(downsampling, 0).repeat(downsampling, 1))
    half = downsampling // 2
    soft = pixels.filter(ImageFilter.MaxFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))
    return Image.composite(drawn, picture, soft)
