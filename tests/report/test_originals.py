"""Pictures are drawn onto others by the stock pipelines: in the hole that a mask says, or all over."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    KandinskyV22InpaintPipeline,
    KandinskyV22PriorPipeline,
    UNet2DConditionModel,
)
from filling import decoder_like, sees_hints
from PIL import Image
from typer.testing import CliRunner

from kcache.encoders.repositories import pipeline_class
from kcache.errors import ConfigError, MemoryShortError, ModelError
from kcache.objectives.lora import add_lora, fuse_lora, save_lora
from kcache.objectives.widening import learnt_whole, widen_for_hints, widen_for_masks
from kcache.report.drawn.halves import load_pipeline
from kcache.report.drawn.kept import put_back
from kcache.report.drawn.originals import read_original
from kcache.report.sampling import draw_embeds, draw_pictures, sample
from kcache_cli.app import app

TWO_STEPS = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def filling(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder's repository with a network of nine input channels, and an index that knows nothing of it."""
    folder = tmp_path_factory.mktemp("filling") / "decoder"
    shutil.copytree(oracle / "decoder", folder)
    config = UNet2DConditionModel.load_config(folder / "unet") | {"in_channels": 9}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 200 x 100 pixels, dark on the left and light on the right."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 100:] = (240, 220, 200)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def a_mask(path: Path, size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Path:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    mask.save(path)
    return path


def draw(oracle: Path, decoder: Path, prompts: tuple[str, ...] = ("a red circle",), **settings: Any) -> np.ndarray:
    given: dict[str, Any] = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "device": "cpu"} | settings
    drawn = sample(prompts, prior=str(oracle / "prior"), decoder=str(decoder), **given)
    return np.stack([np.asarray(picture) for picture in drawn])


@pytest.mark.parametrize(
    ("half", "config", "name"),
    [
        ("decoder", {"in_channels": 4, "out_channels": 8, "addition_embed_type": "image"}, "Pipeline"),
        ("decoder", {"in_channels": 9, "out_channels": 8, "addition_embed_type": "image"}, "InpaintPipeline"),
        ("decoder", {"in_channels": 8, "out_channels": 8, "addition_embed_type": "image_hint"}, "ControlnetPipeline"),
        ("decoder", {"in_channels": 4, "out_channels": 4}, "Pipeline"),
        ("prior", {}, "PriorPipeline"),
    ],
)
def test_the_class_of_a_pipeline_follows_from_its_network(half: str, config: dict[str, Any], name: str) -> None:
    assert pipeline_class(half, config) == f"KandinskyV22{name}"


def test_a_hole_is_filled_as_the_stock_pipeline_does_and_the_rest_has_its_own_pixels(
    oracle: Path, filling: Path, photo: Path
) -> None:
    mask = a_mask(photo.parent / "mask.png", (200, 100), (0, 0, 100, 100))
    ours = draw(oracle, filling, image=photo, mask=mask, height=64, width=128, seed=3)[0]
    prior = load_pipeline(KandinskyV22PriorPipeline, oracle / "prior")
    generator = torch.Generator().manual_seed(3)
    embeds = prior("a red circle", generator=generator, **TWO_STEPS)
    stock = load_pipeline(KandinskyV22InpaintPipeline, filling)(
        **embeds,
        image=Image.open(photo),
        mask_image=Image.open(mask).resize((128, 64)),
        height=64,
        width=128,
        generator=generator,
        **TWO_STEPS,
    ).images[0]
    assert np.array_equal(ours[:, :72], np.asarray(stock)[:, :72])  # the hole, and the latent by which it grows
    given = np.asarray(Image.open(photo).resize((128, 64), Image.Resampling.BICUBIC, reducing_gap=1))
    assert np.array_equal(ours[:, 80:], given[:, 80:])
    assert not np.array_equal(np.asarray(stock)[:, 80:], given[:, 80:])


def test_pictures_filled_together_are_those_filled_alone(filling: Path, oracle: Path, photo: Path) -> None:
    mask = a_mask(photo.parent / "mask.png", (200, 100), (60, 20, 120, 80))
    original = read_original(photo, mask, None)
    assert original is not None
    onto: Any = original.fitted((64, 128), 8)
    prior = load_pipeline(KandinskyV22PriorPipeline, oracle / "prior")
    decoder = load_pipeline(KandinskyV22InpaintPipeline, filling)
    prompts = ["a red circle", "a blue square", "a fox"]

    def drawn(batch_size: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
        embeds = draw_embeds(prior, prompts, generators, **TWO_STEPS)
        pictures = draw_pictures(
            decoder, embeds, generators, batch_size=batch_size, onto=onto, height=64, width=128, **TWO_STEPS
        )
        whole = [put_back(picture, onto["image"], onto["mask_image"], 8) for picture in pictures]
        return np.stack([np.asarray(picture) for picture in whole]).astype(int)

    alone = drawn(1)
    assert np.abs(drawn(2) - alone).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 20
    assert np.array_equal(
        alone, draw(oracle, filling, tuple(prompts), image=photo, mask=mask, height=64, seed=5, width=128)
    )


def test_a_checkpoint_of_a_widened_decoder_fills_holes(
    oracle: Path, filling: Path, photo: Path, tmp_path: Path
) -> None:
    """The network decides, not the pipeline that it was begun from, which draws whole pictures."""
    run = tmp_path / "run"
    raw = run / "checkpoint-2"
    shutil.copytree(filling / "unet", raw / "unet")
    (raw / "state.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"base": {"name": str(oracle / "decoder"), "revision": None}}))
    (run / "metrics.jsonl").touch()
    mask = a_mask(tmp_path / "mask.png", (200, 100), (0, 0, 64, 64))
    settings = {"image": photo, "mask": mask, "height": 64, "width": 64}
    assert np.array_equal(draw(oracle, raw, **settings), draw(oracle, filling, **settings))


@pytest.mark.parametrize("kind", ["masks", "hints"])
def test_a_lora_widens_the_plain_decoder_that_it_is_given_beside(
    oracle: Path, photo: Path, tmp_path: Path, kind: str
) -> None:
    """The same picture, to rounding, as from a wide decoder with the LoRA in its weights; no other decoder will do."""
    unet = UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet")
    (widen_for_masks if kind == "masks" else widen_for_hints)(unet)
    add_lora(unet, rank=2, alpha=None, dropout=0.0, target_modules=(), seed=0, whole=learnt_whole(unet))
    with torch.no_grad():
        unet.conv_in.weight[:, 4:] = 0.1
    for name in ("one", "two"):
        save_lora(unet, tmp_path / name)
    fuse_lora(unet)
    merged = Path(decoder_like(tmp_path / "merged", oracle, lambda _: None))
    unet.save_pretrained(merged / "unet")
    mask = a_mask(tmp_path / "mask.png", (200, 100), (0, 0, 64, 64))
    settings: dict[str, Any] = {"image": photo, "mask": mask} if kind == "masks" else {"hint": photo}
    settings |= {"height": 64, "width": 64}
    plain, lora = oracle / "decoder", [str(tmp_path / "one")]
    drawn, expected = (draw(oracle, plain, lora=lora, **settings), draw(oracle, merged, **settings))
    assert np.abs(drawn.astype(int) - expected).max() <= 1  # the first layer adds up in another order
    with pytest.raises(ConfigError, match=f"the decoder {plain} with {lora[0]} .*give --(image and --mask|hint)"):
        draw(oracle, plain, lora=lora)
    for decoder, given in ((merged, lora), (plain, [*lora, str(tmp_path / "two")])):
        with pytest.raises(ModelError, match=r"makes a plain decoder a wider one, .* found a network of [89] input"):
            draw(oracle, decoder, lora=given, **settings)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64), (64, 64)])
def test_a_picture_is_drawn_over_as_it_stands(oracle: Path, photo: Path, height: int, width: int) -> None:
    """Little of a thousand steps leaves what MoVQ makes of it, whichever side is longer."""
    over = draw(
        oracle, oracle / "decoder", image=photo, strength=0.02, num_inference_steps=50, height=height, width=width
    )[0]
    assert over.shape == (height, width, 3)
    movq = load_pipeline(KandinskyV22InpaintPipeline, oracle / "decoder").movq
    original = read_original(photo, None, 0.02)
    assert original is not None
    fitted = np.asarray(original.fitted((height, width), 8)["image"])
    assert fitted[:, : width // 2 - 4].mean() < 10 < 200 < fitted[:, width // 2 + 4 :].mean()
    with torch.no_grad():
        pixels = torch.tensor(fitted).permute(2, 0, 1)[None] / 127.5 - 1
        back = movq.decode(movq.encode(pixels).latents, force_not_quantize=True).sample[0]
    there = ((back / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    turned = np.abs(over.astype(float) - there[::-1, ::-1]).mean()
    assert np.abs(over.astype(float) - there).mean() < min(8, turned / 2)


def test_a_picture_is_drawn_over_by_three_tenths_of_the_steps(oracle: Path, photo: Path) -> None:
    settings = {"image": photo, "height": 64, "width": 128, "num_inference_steps": 4}
    usual, some, whole = (draw(oracle, oracle / "decoder", strength=each, **settings) for each in (None, 0.3, 1.0))
    assert np.array_equal(usual, some)
    assert not np.array_equal(usual, whole)


def sizes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sizes: list[tuple[int, int]] = []
    monkeypatch.setattr("kcache.report.sampling.load_half", lambda *_: None)
    monkeypatch.setattr("kcache.report.sampling.draw_embeds", lambda *_, **__: [])
    monkeypatch.setattr(
        "kcache.report.sampling.draw_pictures", lambda *_, height, width, **__: sizes.append((height, width)) or []
    )
    return sizes


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (512, 1088)),
        ({"aspect_ratio": "1:1"}, (768, 768)),
        ({"height": 64, "width": 192}, (64, 192)),
        ({"height": 64}, (64, 768)),
    ],
)
def test_a_picture_keeps_its_proportions(
    oracle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], size: tuple[int, int]
) -> None:
    sizes = sizes_of(monkeypatch)
    prior, decoder = str(oracle / "prior"), str(oracle / "decoder")
    sample(["a"], prior=prior, decoder=decoder, image=photo, device="cpu", **asked)
    assert sizes == [size]


def holes(photo: Path, mask: Path, shape: tuple[int, int]) -> np.ndarray:
    original = read_original(photo, mask, None)
    assert original is not None
    return np.asarray(original.fitted(shape, 8)["mask_image"])[::8, ::8] > 0


def test_thin_lines_are_holes_and_the_mask_is_cropped_as_the_picture(photo: Path, tmp_path: Path) -> None:
    thin = a_mask(tmp_path / "thin.png", (200, 100), (51, 0, 52, 100))
    found = holes(photo, thin, (64, 64))  # the middle 100 x 100 of it: column 51 is column 0.6 of 64
    assert found[:, 0].all()
    assert found.sum() == 8
    larger = a_mask(tmp_path / "larger.png", (400, 200), (300, 150, 400, 200))
    assert np.argwhere(holes(photo, larger, (64, 128))).min(axis=0).tolist() == [6, 12]
    blocks = read_original(photo, thin, None)
    assert blocks is not None
    fitted = np.asarray(blocks.fitted((64, 64), 8)["mask_image"])
    assert np.array_equal(fitted, np.kron(fitted[::8, ::8], np.ones((8, 8), np.uint8)))


def test_files_of_masks_are_read_as_editors_write_them(photo: Path, tmp_path: Path) -> None:
    grey = a_mask(tmp_path / "grey.png", (200, 100), (0, 0, 100, 50))
    expected = holes(photo, grey, (64, 128))
    assert expected[:4, :8].all()
    assert expected.sum() == 32
    with Image.open(grey) as mask:
        mask.convert("RGB").save(tmp_path / "rgb.png")
        mask.convert("1").save(tmp_path / "bits.png")
        deep = np.asarray(mask).astype(np.uint16) * 257
    Image.fromarray(np.where(deep > 0, deep, np.uint16(300))).save(tmp_path / "deep.png")  # 300 of 65,535 is black
    turned = Image.open(grey).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("rgb", "bits", "deep", "turned"):
        assert np.array_equal(holes(photo, tmp_path / f"{name}.png", (64, 128)), expected), name


def test_what_does_not_go_together_is_refused(oracle: Path, filling: Path, photo: Path, tmp_path: Path) -> None:
    plain, folder = oracle / "decoder", tmp_path
    mask = a_mask(folder / "mask.png", (200, 100), (0, 0, 64, 64))
    stencil = Image.new("RGBA", (200, 100), (255, 255, 255, 0))
    stencil.paste((0, 0, 0, 255), (0, 0, 64, 64))
    stencil.save(folder / "stencil.png")
    (folder / "words.png").write_text("not a picture")
    black, square = a_mask(folder / "black.png", (200, 100)), a_mask(folder / "square.png", (99, 99), (0, 0, 9, 9))
    aside = a_mask(folder / "aside.png", (200, 100), (0, 0, 20, 100))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (plain, {"mask": mask}, "--mask .* expected one; give --image PATH"),
        (plain, {"strength": 0.5}, "--strength 0.5 says what to do with a picture; expected one; give --image PATH"),
        (plain, {"image": photo, "mask": mask}, "fills no holes; .* give --decoder kandinsky-community/.*-inpaint, or"),
        (plain, {"image": photo, "strength": 0.0}, "--strength is 0; expected a share"),
        (plain, {"image": photo, "strength": 1.5}, "--strength is 1.5; expected a share"),
        (plain, {"image": photo, "strength": float("nan")}, "--strength is nan; expected a share"),
        (plain, {"image": photo, "strength": 0.2, "num_inference_steps": 4}, "less than one step; .*-steps 5 or more"),
        (plain, {"image": photo, "strength": 1e-320}, "less than one step; .* give a larger --strength"),
        (plain, {"num_inference_steps": 1001}, "--num-inference-steps is 1001; expected 1 to 1000; type .* 1000"),
        (plain, {"prior_num_inference_steps": 1}, "--prior-num-inference-steps is 1; expected 2 or more; type .* 2"),
        (plain, {"image": folder / "none.png"}, r"--image .*none\.png cannot be read \(No such file"),
        (plain, {"image": folder}, "--image .* cannot be read .*; expected the file of a picture"),
        (plain, {"image": "https://example.org/a.png"}, "--image: .*https"),
        (plain, {"image": folder / "words.png"}, "--image .*words.png: not an image in a known format.*; expected a"),
        (filling, {}, "fills holes in pictures; .* give --image and --mask, or a --decoder"),
        (filling, {"image": photo}, "fills holes in pictures; .* give --mask, or a --decoder"),
        (filling, {"image": photo, "mask": mask, "strength": 0.5}, "--strength 0.5 is for pictures drawn over"),
        (filling, {"image": photo, "mask": black}, "no white: its lightest pixel is 0 of 255; .* give another"),
        (filling, {"image": photo, "mask": aside, "height": 64, "width": 64}, "no white in what is drawn"),
        (filling, {"image": photo, "mask": square}, "is 99 wide and 99 high, the picture 200 and 100; expected"),
        (filling, {"image": photo, "mask": folder / "stencil.png"}, "is transparent in parts; .* flatten it"),
    ]  # fmt: skip
    for decoder, settings, said in cases:
        with pytest.raises(ConfigError, match=said):
            draw(oracle, decoder, **settings)


def test_a_picture_larger_than_memory_is_refused_by_name(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("kcache.report.drawn.originals.decode_image", none_left)
    with pytest.raises(MemoryShortError, match=r"decoding --image .*photo\.png .*; give a smaller one"):
        read_original(photo, None, None)


def test_prompts_are_drawn_by_a_hint_of_its_own_proportions(
    oracle: Path, filling: Path, photo: Path, tmp_path: Path
) -> None:
    by = decoder_like(tmp_path / "hinted", oracle, sees_hints)
    settings = {"hint": photo, "prompts": ("a red circle", "a blue square")}
    given = read_original(None, None, None, photo)
    assert given is not None
    assert given.shape == (100, 200)
    small = {"height": 64, "width": 64}
    first, again = (draw(oracle, Path(by), **settings, **small) for _ in range(2))
    assert np.array_equal(first, again)
    dark = tmp_path / "dark.png"
    Image.new("L", (200, 100)).save(dark)
    assert not np.array_equal(first, draw(oracle, Path(by), hint=dark, prompts=settings["prompts"], **small))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (Path(by), {}, "draws by a hint, .* give --hint PATH"),
        (Path(by), {"image": photo}, "draws by a hint, .* give --hint PATH"),
        (Path(by), {"hint": tmp_path / "none.png"}, r"--hint .*none\.png cannot be read"),
        (oracle / "decoder", {"hint": photo}, "reads no hints; .* give --decoder kandinsky-community/.*-depth, or"),
        (filling, {"hint": photo}, "reads no hints"),
        (Path(by), {"hint": photo, "image": photo}, "--hint .* with --image .*; expected one of the two"),
        (Path(by), {"hint": photo, "strength": 0.5}, "--hint .* with --strength 0.5: .*; expected one"),
    ]  # fmt: skip
    for decoder, given, said in cases:
        with pytest.raises(ConfigError, match=said):
            draw(oracle, decoder, **given)


def test_a_mask_of_white_keeps_nothing_and_says_so(
    filling: Path, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    white = a_mask(tmp_path / "white.png", (200, 100), (0, 0, 200, 100))
    assert holes(photo, white, (64, 64)).all()
    assert "nothing of the --image is kept" in caplog.text


def test_the_command_takes_a_picture_and_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "kcache.report.sampling.sample",
        lambda prompts, **settings: asked.update(settings) or [Image.new("RGB", (8, 8))],
    )
    command = ["sample", "a fox", "--image=a.png", "--mask=b.png", "--strength=0.5", f"--output-dir={tmp_path}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (asked["image"], asked["mask"], asked["strength"]) == (Path("a.png"), Path("b.png"), 0.5)
