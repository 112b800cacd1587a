"""The demo's networks: a Kandinsky 2.2 pair, true in architecture and tiny in size.

The frozen encoders are trained: benchmarks/pretrain_demo.py made the weights in models/, and models/training.json says
how. The prior and the decoder, which the demo trains, begin with random weights.
"""

from collections import Counter
from collections.abc import Set
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kcache.demo.digits import SIDE, vocabulary
from kcache.disk.durable import share
from kcache.encoders.pretrained import without_advice

with without_advice():
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

EMBEDDING = 64
"""Width of image and text embeddings; the published networks have 1280."""
TEXT_LENGTH = 16
"""Tokens of a padded caption; the published networks have 77."""
WEIGHTS = Path(__file__).parent / "models"
"""Folder of the trained weights, float16."""
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
"""Marks of CLIP's tokenizer."""


def demo_models(folder: Path, encoders: Path = WEIGHTS, *, seed: int = 0, paper: int = SIDE) -> tuple[Path, Path]:
    """Write the prior's and the decoder's pipeline under `folder` and return where they are, the same every time.

    Both are folders in diffusers' layout, which the stock pipelines load. `encoders` has the trained weights; `seed`
    decides those that the prior and the UNet begin with. On `paper` of more pixels CLIP sees the middle, as it stands.
    """
    prior, decoder = folder / "kandinsky-2-2-prior", folder / "kandinsky-2-2-decoder"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        KandinskyV22PriorPipeline(
            prior=_prior(encoders),
            image_encoder=_trained(image_encoder(), encoders / "image_encoder.safetensors"),
            text_encoder=_trained(text_encoder(words), encoders / "text_encoder.safetensors"),
            tokenizer=words,
            scheduler=_prior_scheduler(),
            image_processor=image_processor(paper),
        ).save_pretrained(prior)
        # diffusers writes the class by the name that transformers falls back to without torchvision; the published
        # pipelines say CLIPImageProcessor, which loads everywhere.
        index = prior / "model_index.json"
        names = index.read_text(encoding="utf-8").replace("CLIPImageProcessorPil", "CLIPImageProcessor")
        index.write_text(names, encoding="utf-8")
        KandinskyV22Pipeline(
            unet=_unet(), scheduler=_decoder_scheduler(), movq=_trained(movq(), encoders / "movq.safetensors")
        ).save_pretrained(decoder)
    share(prior)
    share(decoder)
    return prior, decoder


def _trained(network: torch.nn.Module, weights: Path) -> torch.nn.Module:
    """`network` with the weights that were trained for it, in float32."""
    network.load_state_dict(load_file(weights))
    return network


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary of the demo's own: each word of its captions is one token."""
    merges = _merges({word for caption in vocabulary() for word in caption.split()})
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        START,
        END,
        *letters,
        *(letter + WORD_END for letter in letters),
        *(left + right for left, right in merges),
    ]
    ids = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TEXT_LENGTH)


def _merges(words: Set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each of `words` one token: always the most frequent pair (Sennrich et al. 2016).

    Ties go to the first in the alphabet, so that the merges are the same every time.
    """
    split = [[*word[:-1], word[-1] + WORD_END] for word in sorted(words)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for tokens in split for pair in pairwise(tokens)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = [_merged(tokens, best) for tokens in split]
        merges.append(best)
    return merges


def _merged(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def text_encoder(words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=EMBEDDING,
        projection_dim=EMBEDDING,
        intermediate_size=2 * EMBEDDING,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=96,
        projection_dim=EMBEDDING,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPVisionModelWithProjection(config)


def image_processor(paper: int = SIDE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": paper},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )


def _prior(encoders: Path) -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        embedding_dim=EMBEDDING,
        num_embeddings=TEXT_LENGTH,
        additional_embeddings=4,
        added_emb_type="prd",
        encoder_hid_proj_type="linear",
    )
    # A published prior comes with the mean and the spread of image embeddings, too; a new one divides by zero.
    prior.load_state_dict(load_file(encoders / "prior_statistics.safetensors"), strict=False)
    return prior


def _prior_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(
        variance_type="fixed_small_log",
        num_train_timesteps=1000,
        clip_sample=True,
        clip_sample_range=5.0,
        prediction_type="sample",
        beta_schedule="squaredcos_cap_v2",
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=8,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        # Eight channels or more per group: with one per group, normalisation erases each picture's mean colour.
        norm_num_groups=8,
        attention_head_dim=32,
        cross_attention_dim=EMBEDDING,
        encoder_hid_dim=EMBEDDING,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )


def _decoder_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        thresholding=True,
        dynamic_thresholding_ratio=0.995,
        sample_max_value=2.0,
        prediction_type="epsilon",
        variance_type="learned_range",
    )


def movq() -> VQModel:
    return VQModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=512,
        sample_size=SIDE,
    )
