"""The frozen networks: one image or caption in, the rows of one table out, always in batches of the recipe's shape."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from kcache.encoders.decoding import Decoding, decode_image, one_if_large
from kcache.encoders.pixels import ControlEncoder, clip_pixels, clip_processor, movq_pixels
from kcache.encoders.pretrained import load_pretrained
from kcache.encoders.repositories import Repository
from kcache.encoders.tokenizers import CaptionTokenizer
from kcache.errors import InputRejected, ModelError
from kcache.foreign import told
from kcache.store.recipe import LATENTS, Recipe, kind_of

Rows = dict[str, Tensor]

_CLASSES: dict[str, type[Any]] = {
    network.__name__: network for network in (CLIPVisionModelWithProjection, CLIPTextModelWithProjection, VQModel)
}

_OF_NETWORK = ("encoder", "weights", "config", "compute_dtype")
"""What of a recipe decides the network."""


class Encoder(Protocol):
    """A frozen network with its preprocessing, which makes the rows of the table that `recipe` describes."""

    recipe: Recipe
    device: torch.device
    """Where the network runs."""

    @property
    def batch_size(self) -> int:
        """Most inputs that one call of `encode` takes."""

    def prepare(self, content: Any) -> Any:
        """One input (an image file's bytes, or a caption) made ready for `encode`, on the CPU.

        Safe to call from several threads; raises InputRejected.
        """

    def reserved(self) -> Any:
        """The prepared input of the table's reserved row; None when it has none."""

    def batch_shape(self, prepared: Any) -> tuple[int, ...]:
        """Shape of the batch in which a prepared input is encoded, whatever else is: one `encode` takes one shape."""

    def encode(self, prepared: Sequence[Any]) -> Rows:
        """Rows of 1 to batch_size prepared inputs, on the encoder's device and in the recipe's compute dtype."""


class PictureEncoder:
    """An encoder of images: an image file's bytes → rows of one field.

    CLIP's image encoder gives image_embeds (k, D), MoVQ's gives latents (k, 4, h/8, w/8), before quantisation and not
    scaled. `prepare` is `pixels` of the `picture` in a file: who encodes an image in several ways decodes it once.
    """

    def __init__(
        self,
        recipe: Recipe,
        repository: Repository,
        device: torch.device,
        max_pixels: int | None = None,
        network: "_Frozen | None" = None,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.batch_size = recipe.batch_shape[0]
        self.decoding = Decoding.of(recipe, max_pixels)
        if kind_of(recipe.table) == LATENTS:
            height, width = recipe.batch_shape[-2:]
            self._pixels: Callable[[Image.Image], np.ndarray] = lambda picture: movq_pixels(picture, (height, width))
            self._output: Callable[[Any, Tensor], Tensor] = lambda network, pixels: network.encode(pixels).latents
        else:
            processor = clip_processor(recipe.preprocess["processor"])
            self._pixels = lambda picture: clip_pixels(picture, processor)
            self._output = lambda network, pixels: network(pixels).image_embeds
        self._network = network or _Frozen(recipe, repository, device)

    def network_for(self, recipe: Recipe) -> "_Frozen | None":
        """The network, where that is what makes the rows of `recipe`, too: of pictures of another shape."""
        own = [getattr(each, name) for each in (self.recipe, recipe) for name in _OF_NETWORK]
        return self._network if own[: len(_OF_NETWORK)] == own[len(_OF_NETWORK) :] else None

    def prepare(self, content: bytes) -> np.ndarray:
        """Pixels (3, h, w) float32 of an image file."""
        return self.pixels(self.picture(content))

    def picture(self, content: bytes) -> Image.Image:
        """The RGB picture in an image file, as the recipe says; raises InputRejected."""
        return decode_image(content, self.decoding)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """Pixels (3, h, w) float32 of an RGB picture."""
        with one_if_large(picture):
            return self._pixels(picture)

    def reserved(self) -> np.ndarray | None:
        """The all-zero pixel tensor, which stands for "no image" in guidance; None for latents."""
        return (
            None if kind_of(self.recipe.table).reserved is None else np.zeros(self.recipe.batch_shape[1:], np.float32)
        )

    def batch_shape(self, prepared: np.ndarray) -> tuple[int, ...]:
        """The recipe's, for every image."""
        return self.recipe.batch_shape

    def encode(self, prepared: Sequence[np.ndarray]) -> Rows:
        """{the recipe's one field: (k, …)} of k pixel arrays."""
        pixels = _full_batch(prepared, self.recipe.batch_shape)
        [field] = self.recipe.fields

        def forward(network: Any, dtype: torch.dtype) -> Rows:
            return {field.name: self._output(network, pixels.to(self._network.device, dtype))[: len(prepared)]}

        return self._network.run(forward)


class TextEncoder:
    """CLIP's text encoder: a caption → text_embeds and the states of its tokens, padding left out."""

    def __init__(self, recipe: Recipe, repository: Repository, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.batch_size = recipe.batch_shape[0]
        self._tokenizer = CaptionTokenizer(load_tokenizer(repository), recipe.batch_shape[1])
        self._network = _Frozen(recipe, repository, device)

    def prepare(self, content: str) -> tuple[np.ndarray, int]:
        """Token ids (77,) int64 of a caption, padded or cut to that length, and how many of them are valid."""
        try:
            ids, valid = self._tokenizer.tokens(content)
        except (TypeError, ValueError) as error:
            raise InputRejected("tokenize", f"the tokenizer cannot take this caption: {error}") from error
        return np.array(ids, np.int64), valid

    def reserved(self) -> tuple[np.ndarray, int]:
        """The empty caption, which stands for "no text" in guidance."""
        return self.prepare("")

    def batch_shape(self, prepared: tuple[np.ndarray, int]) -> tuple[int, ...]:
        """The recipe's, or where captions are trimmed, only as long as this one rounded up to the recipe's multiple."""
        rows, longest = self.recipe.batch_shape
        step = self.recipe.preprocess.get("pad_to_multiple_of", longest)
        return rows, min(-(-prepared[1] // step) * step, longest)

    def encode(self, prepared: Sequence[tuple[np.ndarray, int]]) -> Rows:
        """Rows of k captions whose tokens sum to T.

        {"text_embeds": (k, D), "text_encoder_hidden_states": (T, D), "text_offsets": (k + 1,) int64}; the states of
        caption i are rows text_offsets[i] to text_offsets[i + 1].
        """
        device = self._network.device
        shapes = {self.batch_shape(caption) for caption in prepared}
        if len(shapes) > 1:
            raise ValueError(f"captions of one batch are to be padded to {shapes}; expected one shape: `full_batches`")
        shape = shapes.pop()
        input_ids = _full_batch([ids[: shape[1]] for ids, _ in prepared], shape).to(device)
        lengths = torch.tensor([length for _, length in prepared], device=device)
        valid = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]

        def forward(network: Any, dtype: torch.dtype) -> Rows:
            # No attention mask, as in the upstream scripts; attention is causal, so valid states never see padding.
            output = network(input_ids)
            states = output.last_hidden_state[: len(prepared)]
            return {
                "text_embeds": output.text_embeds[: len(prepared)],
                "text_encoder_hidden_states": states.masked_fill(~valid[..., None], 0),
            }

        rows = self._network.run(forward)
        rows["text_encoder_hidden_states"] = rows["text_encoder_hidden_states"][valid]
        rows["text_offsets"] = nn.functional.pad(lengths.cumsum(0), (1, 0))
        return rows


def full_batches(encoder: Encoder, inputs: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """`inputs`, each with its number, in batches of one shape: handed out once full, what is left of each at the end.

    Where all inputs have one shape, batches are runs of them.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
    for number, prepared in inputs:
        shape = encoder.batch_shape(prepared)
        batch = waiting.setdefault(shape, [])
        batch.append((number, prepared))
        if len(batch) == encoder.batch_size:
            yield waiting.pop(shape)
    yield from waiting.values()


def load_encoder(
    recipe: Recipe,
    repository: Repository,
    device: torch.device,
    max_pixels: int | None = None,
    held: Encoder | None = None,
) -> Encoder:
    """The encoder that makes the rows of `recipe`, its network loaded from `repository` on `device`.

    The network is that of `held`, an encoder on that device, where `shares_network` says so. Pictures of more than
    `max_pixels` are rejected; None for those that are in a cache already. Raises ModelError when the weights do not fit
    the network, ConfigError where Pillow cannot convert colours as the recipe says.
    """
    if kind_of(recipe.table).per == "caption":
        return TextEncoder(recipe, repository, device)
    if kind_of(recipe.table).per == "control":
        return ControlEncoder(recipe, max_pixels)
    network = held.network_for(recipe) if isinstance(held, PictureEncoder) else None
    return PictureEncoder(recipe, repository, device, max_pixels, network)


def shares_network(held: Encoder | None, recipe: Recipe) -> bool:
    """Whether the network of an encoder makes the rows of `recipe`, too."""
    return isinstance(held, PictureEncoder) and held.network_for(recipe) is not None


class _Frozen:
    """A network in the recipe's compute dtype, and the same in float32 once half precision fails on a row."""

    def __init__(self, recipe: Recipe, repository: Repository, device: torch.device) -> None:
        self.device = device
        self._folder = repository.path / kind_of(recipe.table).component
        self._class = _CLASSES[recipe.encoder]
        self._dtype: torch.dtype = getattr(torch, recipe.compute_dtype)
        self._network = self._load(self._dtype)
        self._float32: nn.Module | None = None

    @torch.inference_mode()
    def run(self, forward: Callable[[Any, torch.dtype], Rows]) -> Rows:
        """The rows that `forward` computes; those with NaN or Inf in half precision are computed again in float32."""
        rows = forward(self._network, self._dtype)
        if self._dtype == torch.float32:
            return rows
        broken = torch.stack([~values.isfinite().flatten(1).all(1) for values in rows.values()]).any(0)
        if broken.any():
            if self._float32 is None:
                self._float32 = self._load(torch.float32)
            for name, values in forward(self._float32, torch.float32).items():
                rows[name][broken] = values[broken].to(self._dtype)
        return rows

    def _load(self, dtype: torch.dtype) -> nn.Module:
        network = load_pretrained(self._class, self._folder, dtype)
        if self._class is VQModel:
            # Only the encoder half is used.
            del network.decoder, network.quantize, network.post_quant_conv
        return network.eval().requires_grad_(False).to(self.device)


def load_tokenizer(repository: Repository) -> CLIPTokenizer:
    """The tokenizer of a prior repository; raises ModelError."""
    path = repository.path / "tokenizer"
    with told(ModelError, f"{path} cannot be loaded as CLIPTokenizer", "fetch or export the repository again"):
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.padding_side != "right":
        raise ModelError(f"{path} pads on the {tokenizer.padding_side}; expected the right, as Kandinsky's does")
    return tokenizer


def _full_batch(prepared: Sequence[np.ndarray], shape: tuple[int, ...]) -> torch.Tensor:
    """The inputs as one batch of exactly this shape, filled up with zeros.

    A row does not depend on its companions, but its last bits depend on the shape of the batch.
    """
    batch = np.zeros(shape, prepared[0].dtype)
    np.stack(prepared, out=batch[: len(prepared)])
    return torch.from_numpy(batch)
