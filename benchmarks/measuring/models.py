"""Kandinsky 2.2 with random weights, as it was published or as a scale model, in the layout that kcache loads.

    python benchmarks/measuring/models.py FOLDER --model-size full

Speed does not depend on what the weights are, so benchmarks need none to be downloaded. The architectures are in
configs/; tokenizer and schedulers are the demo's, which cost the same. The full networks take 16 GB of disk.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kcache.demo.tiny import demo_models
from kcache.disk.durable import share
from kcache.encoders.pretrained import without_bars
from kcache.machine import default_device

SIZES = ("tiny", "full")
COMPONENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "prior": PriorTransformer.from_config,
    "image_encoder": lambda settings: CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)),
    "text_encoder": lambda settings: CLIPTextModelWithProjection(CLIPTextConfig(**settings)),
    "unet": UNet2DConditionModel.from_config,
    "movq": VQModel.from_config,
}
HALF = ("image_encoder",)
"""Components that were published in float16; the others were in float32."""


def read_configs(size: str) -> dict[str, Any]:
    """The architecture of every network of `size`, by component."""
    configs = json.loads((Path(__file__).parent / "configs" / f"{size}.json").read_text())
    del configs["origin"]
    return configs


def make_network(component: str, settings: dict[str, Any], device: str) -> Any:
    """A network with random weights on `device`, the same every time on the same kind of device."""
    with torch.random.fork_rng(devices=[] if device in ("cpu", "meta") else None), torch.device(device):
        torch.manual_seed(0)
        network = COMPONENTS[component](settings)
    if component == "prior" and device != "meta":
        network.clip_std.data.fill_(1.0)  # a new prior divides by a spread of zero
    return network


def write_models(folder: Path, size: str, device: str) -> tuple[Path, Path]:
    """Write the prior's and the decoder's pipeline of `size` under `folder`, unless they are there; their folders."""
    done, configs = folder / "complete", read_configs(size)
    prior, decoder = folder / "kandinsky-2-2-prior", folder / "kandinsky-2-2-decoder"
    if done.exists():
        return prior, decoder
    demo_models(folder)
    tokenizer = CLIPTokenizer.from_pretrained(prior / "tokenizer")
    tokenizer.model_max_length = configs["text_encoder"]["max_position_embeddings"]
    tokenizer.save_pretrained(prior / "tokenizer")
    configs["text_encoder"] |= {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    _set_side(prior / "image_processor" / "preprocessor_config.json", configs["image_encoder"]["image_size"])
    for component, settings in configs.items():
        network = make_network(component, settings, device)
        repository = decoder if component in ("unet", "movq") else prior
        with without_bars():
            (network.half() if component in HALF else network).save_pretrained(repository / component)
    share(prior)
    share(decoder)
    done.touch()
    return prior, decoder


def _set_side(path: Path, side: int) -> None:
    processor = json.loads(path.read_text())
    path.write_text(
        json.dumps(processor | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}})
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new, or with the networks already in it")
    parser.add_argument("--model-size", choices=SIZES, default="tiny")
    arguments = parser.parse_args(given)
    for path in write_models(arguments.folder, arguments.model_size, default_device()):
        print(path)


if __name__ == "__main__":
    main()
