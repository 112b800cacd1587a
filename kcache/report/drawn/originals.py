"""The picture that drawing begins with, the mask of what of it is drawn anew, or a hint: as the pipelines take them.

In files of masks and in those pipelines white is drawn anew; `kcache.loader.masks` has 1 for what is kept.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from kcache.config import DEPTH_REPO, INPAINT_REPO
from kcache.config.shapes import Shape, crop_box
from kcache.encoders.decoding import Decoding, decode_image
from kcache.encoders.pixels import WHITE
from kcache.encoders.repositories import FOLLOWING, INPAINTING
from kcache.errors import ConfigError, InputRejected
from kcache.foreign import within_memory
from kcache.store.run_directory import logger
from kcache.urls import remote

STRENGTH = 0.3
"""Share of the steps that a picture is drawn over with, where no mask says what: the pipeline's own default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """A picture, and a mask of the same proportions if there is one, each as its file has it, upright; or a hint."""

    picture: Image.Image
    """RGB."""
    mask: Image.Image | None
    """Greys."""
    is_hint: bool = False
    """Whether the picture is drawn by, and not onto."""

    @property
    def shape(self) -> Shape:
        """Height and width in pixels."""
        return self.picture.height, self.picture.width

    def fitted(self, shape: Shape, downsampling: int) -> dict[str, Image.Image | torch.Tensor]:
        """The middle of both in the proportions of `shape` and of that size, by the names that the pipelines have.

        A hint is (3, H, W) float32 in [0, 1]. `downsampling` is MoVQ's. Where a pixel of a latent is white all of it
        is, or the pipeline, which looks at the first pixel of each alone, would lose thin lines. Raises ConfigError for
        a mask without white.
        """
        height, width = shape
        middle = self.picture.crop(crop_box(*self.picture.size, shape))
        # As MoVQ's pixels are made when a cache is built.
        resized = middle.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
        if self.is_hint:
            return {"hint": torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255}
        fitted: dict[str, Image.Image | torch.Tensor] = {"image": resized}
        if self.mask is None:
            return fitted
        white = np.asarray(self.mask.crop(crop_box(*self.mask.size, shape))) >= WHITE
        latents = _any_of(white, (height // downsampling, width // downsampling))
        if not latents.any():
            lightest = np.asarray(self.mask).max()
            where = f"has no white: its lightest pixel is {lightest} of 255"
            if lightest >= WHITE:
                where = f"has no white in what is drawn: its middle, cropped to {height}×{width} pixels"
            raise ConfigError(
                f"the --mask {where}; expected white, {WHITE} or more, where the picture is drawn anew, black where "
                "it is kept; give another mask"
            )
        if latents.all():
            logger.warning("the --mask is white all over: nothing of the --image is kept")
        blocks = latents.repeat(downsampling, 0).repeat(downsampling, 1)
        return fitted | {"mask_image": Image.fromarray(np.where(blocks, np.uint8(255), np.uint8(0)))}


def read_original(
    image: str | os.PathLike[str] | None,
    mask: str | os.PathLike[str] | None,
    strength: float | None,
    hint: str | os.PathLike[str] | None = None,
) -> Original | None:
    """What the files say; None where there is none. Raises ConfigError for what does not go together."""
    if hint is not None:
        for flag, given in (("--image", image), ("--mask", mask), ("--strength", strength)):
            if given is not None:
                raise ConfigError(
                    f"--hint {hint} with {flag} {given}: a decoder draws by a hint, or onto a picture; expected one of "
                    "the two; leave the other out"
                )
        return Original(picture=_decoded("--hint", Path(hint), "black"), mask=None, is_hint=True)
    if image is None:
        for flag, given in (("--mask", mask), ("--strength", strength)):
            if given is not None:
                raise ConfigError(f"{flag} {given} says what to do with a picture; expected one; give --image PATH")
        return None
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(
            f"--strength is {strength:g}; expected a share of the steps above 0 and up to 1, which draws the picture "
            f"anew; {STRENGTH} is usual"
        )
    picture = _decoded("--image", Path(image), "white")
    return Original(picture=picture, mask=None if mask is None else _read_mask(Path(mask), picture))


def check_drawn_by(class_name: str, decoder: str, original: Original | None, strength: float | None) -> None:
    """Check that a decoder, whose pipeline has a class of that name, draws what is asked for; raises ConfigError."""
    mask, is_hint = None if original is None else original.mask, original is not None and original.is_hint
    if class_name == FOLLOWING and not is_hint:
        raise ConfigError(
            f"the decoder {decoder} draws by a hint, such as a picture of depths; expected one; give --hint PATH, or a "
            "--decoder that draws whole pictures"
        )
    if is_hint and class_name != FOLLOWING:
        raise ConfigError(
            f"the decoder {decoder} reads no hints; expected for --hint one that does; give --decoder {DEPTH_REPO}, or "
            "one that kcache train-decoder --hint made, or leave --hint out"
        )
    if class_name == INPAINTING:
        if mask is None:
            missing = "--image and --mask" if original is None else "--mask"
            raise ConfigError(
                f"the decoder {decoder} fills holes in pictures; expected a picture and a mask, white where it is "
                f"drawn anew; give {missing}, or a --decoder that draws whole pictures"
            )
        if strength is not None:
            raise ConfigError(
                f"--strength {strength:g} is for pictures drawn over as a whole; a hole is filled from nothing; leave "
                "it out"
            )
    elif mask is not None:
        raise ConfigError(
            f"the decoder {decoder} fills no holes; expected for --mask one that does; give --decoder {INPAINT_REPO}, "
            "or one that kcache train-decoder --inpaint made, or leave --mask out"
        )


def check_steps(strength: float, steps: int, most: int) -> None:
    """Raise ConfigError where drawing over with `strength` takes less than one of `steps`, as the pipeline counts.

    There can be `most` steps.
    """
    if int(steps * strength) < 1:
        least = next((each for each in range(steps, most + 1) if int(each * strength)), None)
        do = "a larger --strength" if least is None else f"--num-inference-steps {least} or more"
        raise ConfigError(
            f"--strength {strength:g} of --num-inference-steps {steps} is less than one step; expected one or more; "
            f"give {do}"
        )


def _read_mask(path: Path, picture: Image.Image) -> Image.Image:
    mask = _decoded("--mask", path, "white")
    if mask.tobytes() != _decoded("--mask", path, "black").tobytes():
        raise ConfigError(
            f"--mask {path} is transparent in parts; expected white where the picture is drawn anew and black where it "
            "is kept, and nothing else; flatten it"
        )
    # As far as whole pixels allow.
    if abs(mask.width - picture.width * mask.height / picture.height) > 1 and (
        abs(mask.height - picture.height * mask.width / picture.width) > 1
    ):
        raise ConfigError(
            f"--mask {path} is {mask.width} wide and {mask.height} high, the picture {picture.width} and "
            f"{picture.height}; expected the same proportions; give a mask drawn over this picture"
        )
    return mask.convert("L")


def _decoded(flag: str, path: Path, alpha: Literal["white", "black"]) -> Image.Image:
    if (problem := remote(path)) is not None:
        raise ConfigError(f"{flag}: {problem}")
    how = Decoding(alpha=alpha, color="srgb" if flag == "--image" else "as-is")
    try:
        with within_memory(f"decoding {flag} {path}", "give a smaller one"):
            return decode_image(path.read_bytes(), how)
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be read ({error.strerror or error}); expected the file of a picture"
        ) from error
    except InputRejected as error:
        raise ConfigError(f"{flag} {path}: {error.reason}; expected a picture") from error


def _any_of(white: np.ndarray, cells: Shape) -> np.ndarray:
    """Which of the cells of a grid over `white` (H, W) bool have some: (h, w) bool."""
    rows, columns = (_parts(size, count) for size, count in zip(white.shape, cells, strict=True))
    across = np.stack([white[part].any(0) for part in rows])
    return np.stack([across[:, part].any(1) for part in columns], axis=1)


def _parts(size: int, count: int) -> list[slice]:
    """The pixels of each of `count` parts of `size` pixels, which share those between them."""
    return [slice(number * size // count, -(-(number + 1) * size // count)) for number in range(count)]
