"""What a training run asks of a cache before its first step: the right tables, encoders and shapes."""

from kcache.cache import Cache
from kcache.digests import DigestMemo
from kcache.errors import CacheIncompleteError, CacheMismatchError
from kcache.objectives import Objective
from kcache.repositories import Repository, weights_digest

__all__ = ["check_contract"]

_COMPONENTS = {"image_embeds": "image_encoder", "text_embeds": "text_encoder", "latents": "movq"}
"""Field → folder of the frozen network that made it."""


def check_contract(cache: Cache, objective: Objective, repository: Repository) -> None:
    """Check that `cache` holds what `objective` reads, made by the encoders that `repository` has.

    A decoder repository has no image encoder, so its image_embeds are compared by shape only. Raises
    CacheIncompleteError for a missing table, CacheMismatchError for another encoder or shape, each with what was found
    and what to do.
    """
    if len(cache) == 0:
        raise CacheIncompleteError(f"{cache.path} has no samples; its rejected.jsonl says what was refused and why")
    for field, expected in objective.row_shapes.items():
        found = cache.field(field).shape
        fits = len(found) == len(expected) and all(e in (None, f) for f, e in zip(found, expected, strict=True))
        if not fits:
            raise CacheMismatchError(
                f"{cache.path} has {field} of shape {found}; {repository.name} wants {_shape_text(expected)}; "
                "build the cache with the encoders that belong to this model, or train the model they belong to"
            )
    _check_text_length(cache, objective, repository)
    _check_encoders(cache, objective, repository)


def _check_text_length(cache: Cache, objective: Objective, repository: Repository) -> None:
    if "text_encoder_hidden_states" not in objective.row_shapes:
        return
    found, expected = cache.recipes["text"].batch_shape[1], objective.network.config.num_embeddings
    if found > expected:
        raise CacheMismatchError(
            f"{cache.path} has captions of up to {found} tokens; {repository.name} takes {expected}; "
            "build the cache with the tokenizer that belongs to this model"
        )


def _check_encoders(cache: Cache, objective: Objective, repository: Repository) -> None:
    with DigestMemo() as memo:
        for field, component in _COMPONENTS.items():
            if field not in objective.row_shapes or not (repository.path / component).is_dir():
                continue
            table = cache.table_of(field)
            found, expected = cache.recipes[table].weights, weights_digest(repository, component, memo)
            if found != expected:
                raise CacheMismatchError(
                    f"{table} of {cache.path} was made with the {component} weights {found[:12]}…; "
                    f"{repository.name} has {expected[:12]}…; train from the repository that the cache was built with "
                    f"({_origins(cache)}), or build the cache again with this one"
                )


def _origins(cache: Cache) -> str:
    return ", ".join(f"{half}: {model['name']}" for half, model in cache.models.items())


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if side is None else str(side) for side in shape) + ")"
