"""The digest of a tokenizer is of what it does, whatever files say so."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kcache.encoders.frozen import load_tokenizer
from kcache.encoders.repositories import Repository, find_repository
from kcache.encoders.tokenizers import tokenizer_digest
from kcache.errors import ModelError
from kcache.store.recipe import json_digest

CAPTIONS = ["A red  fox, it's 42", "café au lait", "<|endoftext|> in it", ""]


@pytest.fixture
def prior(oracle: Path, tmp_path: Path) -> Repository:
    """The tokenizer of the tiny prior, to be changed."""
    shutil.copytree(oracle / "prior" / "tokenizer", tmp_path / "prior" / "tokenizer")
    return find_repository(str(tmp_path / "prior"), None, ["tokenizer"])


CONFIG, MAP, WHOLE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"


def edited(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def without(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def written_anew(folder: Path) -> None:
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps(dict(reversed(values.items())), indent=7) + "\n\n")
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text().replace("#version: 0.2\n", "") + "\n")


def as_older_libraries_wrote_it(folder: Path) -> None:
    def change(whole: dict[str, Any]) -> None:
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
        for name in ("byte_fallback", "ignore_merges", "dropout"):
            del whole["model"][name]
        del whole["pre_tokenizer"]["pretokenizers"][1]["use_regex"]

    edited(WHOLE, change)(folder)
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    edited(MAP, lambda said: said.update(eos_token=token))(folder)


EQUAL: dict[str, Callable[[Path], None]] = {
    "lists alone": without("tokenizer.json"),
    "lists alone, nothing of special tokens": without("tokenizer.json", "special_tokens_map.json"),
    "one file alone": without("vocab.json", "merges.txt", "special_tokens_map.json"),
    "written anew": written_anew,
    "older": as_older_libraries_wrote_it,
    "defaults left out": edited(CONFIG, lambda said: [said.pop(n) for n in ("errors", "do_lower_case")]),
    "paths and versions": edited(CONFIG, lambda said: said.update(name_or_path="/x", tokenizer_file="y")),
    "ways of decoding": edited(CONFIG, lambda said: said.update(clean_up_tokenization_spaces=True)),
    "a decoder and padding": edited(WHOLE, lambda said: said.update(decoder=None, padding=None)),
}  # fmt: skip
OTHER: dict[str, Callable[[Path], None]] = {
    "a word": edited(WHOLE, lambda said: said["model"]["vocab"].update({"fox</w>": 1})),
    "the order of merges": edited(WHOLE, lambda said: said["model"]["merges"].reverse()),
    "lists that disagree": edited("vocab.json", lambda said: said.update({"fox</w>": 1})),
    "merges that disagree": lambda folder: (folder / "merges.txt").write_text("a b\n"),
    "a special token": edited(MAP, lambda said: said.update({"pad_token": "!"})),
    "an added token": edited(CONFIG, lambda said: said.update(added_tokens_decoder={"7": {"content": "fox"}})),
    "case": edited(CONFIG, lambda said: said.update(do_lower_case=False)),
    "length": edited(CONFIG, lambda said: said.update(model_max_length=64)),
    "an unknown setting": edited(CONFIG, lambda said: said.update(add_bos_token=False)),
    "how text is made ready": edited(WHOLE, lambda said: said["normalizer"]["normalizers"].pop()),
    "how words are cut": edited(WHOLE, lambda said: said["model"].update(end_of_word_suffix="")),
}  # fmt: skip


@pytest.mark.parametrize("change", EQUAL)
def test_the_same_in_other_files_is_the_same(prior: Repository, change: str) -> None:
    before, tokens = tokenizer_digest(prior), load_tokenizer(prior)(CAPTIONS).input_ids
    EQUAL[change](prior.path / "tokenizer")
    assert tokenizer_digest(prior) == before
    assert load_tokenizer(prior)(CAPTIONS).input_ids == tokens


@pytest.mark.parametrize("change", OTHER)
def test_what_may_change_a_token_counts(prior: Repository, change: str) -> None:
    before = tokenizer_digest(prior)
    OTHER[change](prior.path / "tokenizer")
    assert tokenizer_digest(prior) != before


def test_a_digest_of_files_that_is_on_record_stays(prior: Repository) -> None:
    folder = prior.path / "tokenizer"
    names = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json")
    present = [folder / name for name in names if (folder / name).is_file()]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in present}
    recorded = json_digest({"files": files, "config": prior.read("tokenizer").lasting})
    assert tokenizer_digest(prior, known=recorded) == recorded != tokenizer_digest(prior)


def test_a_tokenizer_without_vocabulary_is_refused(prior: Repository) -> None:
    without("tokenizer.json", "vocab.json")(prior.path / "tokenizer")
    with pytest.raises(ModelError, match=r"no vocabulary.*export the tokenizer again"):
        tokenizer_digest(prior)
    with pytest.raises(ModelError, match=r"no vocabulary.*its download is unfinished"):
        tokenizer_digest(Repository(name="o/prior", path=prior.path, revision="0" * 40))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model": {"vocab": 3, "merges": 1}}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_line(prior: Repository, content: str) -> None:
    (prior.path / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer cannot be read as a tokenizer \(.*fetch or export it again$"):
        tokenizer_digest(prior)
