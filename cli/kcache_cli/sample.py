"""`kcache sample`: pictures from prompts."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcache.config import DECODER_REPO, PRIOR_REPO
from kcache.disk.durable import create_bytes
from kcache_cli.flags import check_folder
from kcache_cli.progress import say

if TYPE_CHECKING:
    from PIL import Image


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; one picture each.")],
    *,
    prior: Annotated[
        str, typer.Option(help="Run directory, one of its checkpoints, or a prior pipeline's folder or Hub id.")
    ] = PRIOR_REPO,
    decoder: Annotated[
        str, typer.Option(help="Run directory, one of its checkpoints, or a decoder pipeline's folder or Hub id.")
    ] = DECODER_REPO,
    prior_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the prior's Hub repository.")
    ] = None,
    decoder_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the decoder's Hub repository.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="Run directory, checkpoint or file of a LoRA, of either network; may be repeated.", metavar="<str>"
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the PNG files; those that are there stay, and the numbers go on.")
    ] = Path("samples"),
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the decoder.")] = 50,
    prior_num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the prior.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="How strongly the decoder follows the image embedding.")] = 4.0,
    prior_guidance_scale: Annotated[float, typer.Option(help="How strongly the prior follows the prompt.")] = 4.0,
    height: Annotated[
        int | None,
        typer.Option(help="Height in pixels; when left out, what most of the decoder's run had, else 768."),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, likewise.")] = None,
    aspect_ratio: Annotated[
        str | None,
        typer.Option(help="Width to height, such as 3:2: the nearest shape that was trained on.", metavar="<w:h>"),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture to draw onto: in its hole by --mask, or all over by --strength.", metavar="<path>"),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="White where --image is drawn anew; for a decoder that fills holes.", metavar="<path>"),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that --image is drawn over with, up to 1; 0.3 when left out."),
    ] = None,
    hint: Annotated[
        Path | None,
        typer.Option(help="Picture to draw by, such as of depths; for a decoder that reads hints.", metavar="<path>"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the noise; picture i starts from seed + i.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to draw, such as cuda:0; chosen by what there is.")] = None,
) -> None:
    """Draw pictures from prompts.

    The stock diffusers pipelines draw, with networks from run directories or published ones, and with LoRAs added.

    \b
    Examples:
      kcache sample "a red fox in the snow" --prior runs/prior --decoder runs/decoder
      kcache sample "a fox" "an owl" --decoder runs/decoder --output-dir pictures --seed 7
      kcache sample "a fox" --decoder runs/decoder/checkpoint-500
      kcache sample "a fox" --decoder runs/decoder --aspect-ratio 3:2
      kcache sample "a fox" --lora runs/prior-lora --lora runs/decoder-lora
      kcache sample "a fox" --decoder runs/inpaint --image photo.jpg --mask hole.png
      kcache sample "a fox in the snow" --decoder runs/decoder --image photo.jpg --strength 0.6
      kcache sample "a fox in the snow" --decoder runs/depth --hint depth.png
    """
    check_folder("--output-dir", output_dir)
    from kcache.report.sampling import sample as draw

    pictures = draw(
        prompts,
        prior=prior,
        decoder=decoder,
        prior_revision=prior_revision,
        decoder_revision=decoder_revision,
        lora=lora or (),
        num_inference_steps=num_inference_steps,
        prior_num_inference_steps=prior_num_inference_steps,
        guidance_scale=guidance_scale,
        prior_guidance_scale=prior_guidance_scale,
        height=height,
        width=width,
        aspect_ratio=aspect_ratio,
        image=image,
        mask=mask,
        strength=strength,
        hint=hint,
        seed=seed,
        device=device,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for prompt, picture in zip(prompts, pictures, strict=True):
        say(str(save(picture, prompt, output_dir)))


def save(picture: "Image.Image", prompt: str, folder: Path) -> Path:
    """Write a picture under the next number in `folder`, over nothing that is there; raises CacheWriteError."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    taken = [int(found[1]) for path in folder.iterdir() if (found := re.match(r"(\d{4,})-.*\.png$", path.name))]
    number = max(taken, default=-1) + 1
    while not create_bytes(path := folder / file_name(number, prompt), content.getvalue()):
        number += 1  # of another process, which draws into this folder, too
    return path


def file_name(number: int, prompt: str) -> str:
    """A portable name for the picture of a prompt: "0003-a-red-fox.png"."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{number:04}-{words[:60].rstrip('-') or 'picture'}.png"
