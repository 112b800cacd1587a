"""The cache's README.md: a dataset card, so that a cache that is published as it is explains itself and loads.

Derived from the manifest and nothing else, so equal caches have equal cards. The front matter follows the Hub's dataset
cards (https://huggingface.co/docs/hub/datasets-cards); with its `dataset_info`, `datasets` reads tars whose samples
have different numbers of captions.
"""

from collections.abc import Sequence

import numpy as np

from kcache.places import Place
from kcache.places.effects import write_bytes
from kcache.store.formats.webdataset import suffix_of
from kcache.store.manifest import Manifest, TableEntry
from kcache.store.recipe import HINT, LOSS_MASKS, MASKS, Field, kind_of

CARD = "README.md"
_MARK = "<!-- Written by kcache, anew with every build. Remove this line to keep your own changes. -->"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))


def write_card(cache: Place, manifest: Manifest, most_captions: int) -> None:
    """Write the card of a cache whose samples have up to `most_captions` captions; one that was taken over stays."""
    path, content = cache / CARD, card_text(manifest, most_captions).encode()
    found = path.read_bytes() if path.exists() else None
    if found is None or (found != content and is_derived(found)):
        write_bytes(path, content)


def is_derived(content: bytes) -> bool:
    """Whether a card is kcache's, and not one that somebody took over."""
    return _MARK.encode() in content


def card_text(manifest: Manifest, most_captions: int) -> str:
    """The card: front matter, counts, encoders, recipes, and how to load it."""
    tars = _tar_folder(manifest)
    lines = [
        "---",
        *_front_matter(manifest, tars, most_captions),
        "---",
        "",
        _MARK,
        "",
        "# Cached inputs for training Kandinsky 2.2",
        "",
        f"What the frozen encoders of Kandinsky 2.2 say about {manifest.samples:,} samples, an image with its captions "
        f"each, as kcache keeps it ({manifest.format}). Training reads these rows instead of running the encoders.",
        "",
        *_shapes(manifest),
        *_controls(manifest),
        "| table | rows | bytes | one row |",
        "|---|---:|---:|---|",
        *(_table_line(name, entry) for name, entry in sorted(manifest.tables.items())),
        "",
        *_encoders(manifest),
        "",
        f"Fingerprint of recipes and samples: `{manifest.fingerprint}`. `samples-*.parquet` lists the samples; "
        f"`rejected.jsonl` names {manifest.rejected:,} inputs that are not among them, with reasons.",
        "",
        "## Loading",
        "",
        *_loading(manifest, tars),
    ]
    return "\n".join(lines) + "\n"


def _shapes(manifest: Manifest) -> list[str]:
    """What pictures are cropped to, where that is no plain square, and whether there are mirrored ones."""
    said = []
    for each in manifest.shape_sets:
        if not each.is_square:
            limit = "" if each.max_upscale is None else f"; none is enlarged more than {each.max_upscale:g} times"
            listed = ", ".join(f"{tall}×{wide}" for tall, wide in each.shapes)
            said.append(
                f"At {each.resolution} pixels each picture is cropped to the shape that keeps most of it, height × "
                f"width: {listed}{limit}."
            )
    if manifest.flip:
        where = "" if manifest.format == "zarr" else ", in members such as `image_embeds.1.npy`"
        said.append(f"Tables of images have rows of the mirrored pictures, too{where}.")
    return [" ".join(said), ""] if said else []


def _controls(manifest: Manifest) -> list[str]:
    """Which control images there are beside the pictures, if any."""
    told = {MASKS: "masks of holes", LOSS_MASKS: "masks of how much each part counts"}
    words = [told.get(name, f"hints called {name.removeprefix(HINT)}") for name in manifest.wants.controls]
    said = f"Images that go with the pictures, cropped as these are, are among the rows: {', '.join(words)}. Each row "
    return [f"{said}is a PNG file, filled up with zeros at its end.", ""] if words else []


def _front_matter(manifest: Manifest, tars: str | None, most_captions: int) -> list[str]:
    size = next((name for limit, name in _SIZES + _LARGER if manifest.samples < limit), "n>1T")
    path = manifest.samples_file if tars is None else f"{tars}/*.tar"
    lines = ["tags:", "- kcache", "- kandinsky-2-2", "- text-to-image", "size_categories:", f"- {size}"]
    lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {path}"]
    if tars is not None:
        lines += ["dataset_info:", "  features:"]
        lines += [f"  {line}" for line in _features(manifest, most_captions)]
    return lines


def _tar_folder(manifest: Manifest) -> str | None:
    """The folder of the tars, if there are any; the newest, as long as some of earlier tables are in use, too."""
    if manifest.format == "zarr":
        return None
    folders = [shard.data.split("/")[0] for entry in manifest.tables.values() for shard in entry.shards]
    return next((folder for folder in reversed(folders) if folder.startswith("samples-")), "samples-*")


def _features(manifest: Manifest, most_captions: int) -> list[str]:
    """The members of a sample as `datasets` types them, those that only some samples have included."""
    info = {"caption_keys": "list", "captions": "list", "height": "int64", "id": "string", "image_key": "string"}
    lines = ["- name: json", "  struct:"]
    for name, dtype in (info | {"name": "string", "width": "int64"}).items():
        kind = ["list: string"] if dtype == "list" else [f"dtype: {dtype}"]
        lines += [f"  - name: {name}", *(f"    {line}" for line in kind)]
    for number in range(most_captions):
        lines += [f'- name: "{_member("", number, "txt")}"', "  dtype: string"]
    shared = [field.name for entry in manifest.tables.values() for field in entry.recipe.fields]
    for name, entry in sorted(manifest.tables.items()):
        for field in entry.recipe.fields:
            member = field.name if shared.count(field.name) == 1 else name
            for number in range(most_captions if kind_of(name).per == "caption" else 1 + manifest.flip):
                suffix = suffix_of(np.dtype(entry.recipe.stored_dtype))
                kind = ["  dtype: image"] if suffix == "png" else _nested(field, entry.recipe.stored_dtype)
                lines += [f'- name: "{_member(member, number, suffix)}"', *kind]
    return [*lines, "- name: __key__", "  dtype: string", "- name: __url__", "  dtype: string"]


def _member(name: str, number: int, suffix: str) -> str:
    return ".".join(part for part in (name, str(number) if number else "", suffix) if part)


def _nested(field: Field, dtype: str) -> list[str]:
    """An array's type as `datasets` writes it: a list of lists of numbers."""
    depth = len(field.shape) + field.ragged
    lines = [f"{'  ' * level}list:" for level in range(1, depth)]
    return [*lines, f"{'  ' * depth}list: {dtype}"]


def _table_line(name: str, entry: TableEntry) -> str:
    fields = []
    for field in entry.recipe.fields if kind_of(name).per != "control" else ():
        shape = ["n", *field.shape] if field.ragged else list(field.shape)
        axes = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        fields.append(f"`{field.name} ({axes})` {entry.recipe.stored_dtype}")
    packed = [f"`{each}` PNG" for each in kind_of(name).fields if kind_of(name).per == "control"]
    return f"| `{name}` | {entry.rows:,} | {entry.bytes:,} | {', '.join(fields or packed)} |"


def _encoders(manifest: Manifest) -> list[str]:
    models = {role: model for role, model in sorted(manifest.models.items()) if model.get("revision")}
    lines = [
        f"* {role}: [{m['name']}](https://huggingface.co/{m['name']}) at `{m['revision']}`"
        for role, m in models.items()
    ]
    for name, entry in sorted(manifest.tables.items()):
        recipe = entry.recipe
        if kind_of(name).per == "control":
            lines.append(f"* `{name}`: packed as it came with the pictures; recipe `{recipe.fingerprint[:16]}…`")
            continue
        lines.append(
            f"* `{name}`: {recipe.encoder} (sha256 of its weights `{recipe.weights[:16]}…`) in {recipe.compute_dtype}, "
            f"batches of {'×'.join(map(str, recipe.batch_shape))}; recipe `{recipe.fingerprint[:16]}…`"
        )
    return lines


def _loading(manifest: Manifest, tars: str | None) -> list[str]:
    fields = [field.name for _, entry in _encoded(manifest) for field in entry.recipe.fields]
    own = ["With kcache, in batches for training or as arrays:", "", *_python(
        "from kcache import Cache",
        "",
        'cache = Cache.open("path/to/this/folder")',
        f'rows = cache.read([0, 1, 2], ["{fields[0]}"])',
    ), ""]  # fmt: skip
    return own + (
        _loading_zarr(manifest) if tars is None else _loading_tars(tars, packed=manifest.wants.controls != ())
    )


def _encoded(manifest: Manifest) -> list[tuple[str, TableEntry]]:
    """The tables of what encoders made, by name."""
    return [(name, entry) for name, entry in sorted(manifest.tables.items()) if kind_of(name).per != "control"]


def _loading_tars(tars: str, *, packed: bool) -> list[str]:
    members = "`.npy`, `.png`, `.txt` and `.json`" if packed else "`.npy`, `.txt` and `.json`"
    return [
        f"With webdataset. Do not call `.decode()`, which unpickles; the members are plain {members}:",
        "",
        *_python(
            "import glob, io",
            "import numpy as np, webdataset",
            "",
            f'tars = sorted(glob.glob("path/to/this/folder/{tars}/*.tar"))',
            "for sample in webdataset.WebDataset(tars, shardshuffle=False):",
            '    row = np.load(io.BytesIO(sample["image_embeds.npy"]), allow_pickle=False)',
        ),
        "",
        'With datasets, where arrays come as nested lists, or as float32 after `.with_format("numpy")`:',
        "",
        *_python("import datasets", "", 'samples = datasets.load_dataset("path/to/this/folder", split="train")'),
    ]


def _loading_zarr(manifest: Manifest) -> list[str]:
    shards = [shard.data for _, entry in _encoded(manifest) for shard in entry.shards]
    return [
        "Every shard is a zarr v3 group that zarr-python, tensorstore, zarrs and xarray open as it is. "
        "Row i is of the image or caption whose key is `keys[i]`; `samples-*.parquet` has the keys of the samples.",
        "",
        *_python("import zarr", "", f'group = zarr.open_group("path/to/this/folder/{min(shards)}", mode="r")'),
        *_opening_packed(manifest),
    ]


def _opening_packed(manifest: Manifest) -> list[str]:
    """How a row of the first table of control images is looked at, if there is one."""
    for name, entry in sorted(manifest.tables.items()):
        if kind_of(name).per == "control" and entry.shards:
            return ["", f"Row i of `{name}` is a picture:", "", *_python(
                "import io",
                "from PIL import Image",
                "",
                f'group = zarr.open_group("path/to/this/folder/{entry.shards[0].data}", mode="r")',
                'first, last = group["text_offsets"][i : i + 2]',
                f'picture = Image.open(io.BytesIO(group["{kind_of(name).fields[0]}"][first:last].tobytes()))',
            )]  # fmt: skip
    return []


def _python(*lines: str) -> Sequence[str]:
    return ["```python", *lines, "```"]
