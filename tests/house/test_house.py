"""The house rules that no other test sees: import weight, layers, pins, and nothing that executes what it opens."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH_FREE = [
    "kcache",
    "kcache.store",
    "kcache.sources",
    "kcache.build",
    "kcache.engines",
    "kcache.upkeep",
    "kcache.report",
    "kcache_cli.app",
]
HEAVY = ("accelerate", "datasets", "diffusers", "torch", "transformers")


def python(code: str, *arguments: str | Path) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_needs_no_torch_loads_none(module: str) -> None:
    assert python(f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def test_no_module_of_the_words_the_store_or_the_sources_loads_torch() -> None:
    files = [*(ROOT / "kcache").glob("*.py"), *python_files("kcache/store", "kcache/sources")]
    imports = "".join(f"import {module_of(path)}\n" for path in files)
    assert python(f"import sys\n{imports}print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ON_A_DISK = """
import sys
from kcache import Cache
from kcache.loader import CacheLoader
from kcache_cli import app

source, cache, *settings = sys.argv[1:]
for words in (["info", cache], ["verify", cache], ["gc", cache, "--dry-run"], ["build", source, cache, *settings]):
    sys.argv = ["kcache", f"cache-{words[0]}", *words[1:]]
    try:
        app.main()
    except SystemExit as ended:
        assert not ended.code, words
assert len(list(CacheLoader(Cache.open(cache), ["latents"], 4))) > 1
print([name for name in ("boto3", "botocore", "obstore", "ray") if name in sys.modules])
"""


def test_what_works_on_a_disk_loads_nothing_for_object_stores_and_clusters(cache: str, oracle: Path) -> None:
    settings = ["--resolution=64", "--dtype=float32", "--batch-size=4"]
    settings += [f"--pretrained-{name}-model-name-or-path={oracle / name}" for name in ("prior", "decoder")]
    said = python(ON_A_DISK, oracle / "data", cache, *settings).splitlines()
    assert "0 to do" in said
    assert said[-1] == "[]"


LOADED = """
import sys
from importlib.metadata import packages_distributions

bare = set(sys.modules)
{}
distributions = packages_distributions()
names = {{name for module in {{*sys.modules}} - bare for name in distributions.get(module.partition(".")[0], ())}}
print(sorted(names))
"""
HELP = """
from kcache_cli import app

sys.argv = ["kcache", "--help"]
try:
    app.main()
except SystemExit as ended:
    assert not ended.code
"""


def test_import_loads_nothing_but_numpy() -> None:
    """Which is what makes it quick: benchmarks/startup.py takes the time."""
    assert ast.literal_eval(python(LOADED.format("import kcache"))) == ["kcache", "numpy"]


def test_help_loads_nothing_but_what_draws_it() -> None:
    *shown, loaded = python(LOADED.format(HELP)).splitlines()
    assert any("cache-build" in line for line in shown)
    assert set(ast.literal_eval(loaded)) <= {"kcache", "numpy", "typer", *closure("typer", set())}


def test_imports_go_one_way() -> None:
    ran = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_constraints_pin_what_is_installed_and_all_of_it() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins == {name: importlib.metadata.version(name).split("+")[0] for name in closure("kcache", {"dev"})}


def closure(name: str, extras: set[str], found: set[str] | None = None) -> set[str]:
    """The distributions that `name` needs here, and those that they need; not what only CUDA builds of torch need."""
    found = set() if found is None else found
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        needed = canonicalize_name(requirement.name)
        if not applies or needed in found or needed.startswith(("nvidia-", "cuda-")) or needed == "triton":
            continue
        found.add(needed)
        closure(needed, set(requirement.extras), found)
    return found


def test_what_is_imported_is_a_dependency_and_the_other_way_round() -> None:
    names = {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]}
    modules = {{"pillow": "PIL", "pyyaml": "yaml"}.get(name, name) for name in names}
    imported = set[str]()
    for path in python_files("kcache", "cli"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    own = {"kcache", "kcache_cli", "matplotlib"}  # the last by its name, in `kcache.decoration`
    extras = PYPROJECT["project"]["optional-dependencies"]
    optional = {Requirement(text).name for name, texts in extras.items() if name != "dev" for text in texts}
    assert imported - sys.stdlib_module_names - own - optional == modules - {"matplotlib"}


UNSAFE_MODULES = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "runpy", "shelve"}
UNSAFE_CALLS = {"__import__", "compile", "eval", "exec", "os.popen", "os.system", "torch.load", "yaml.load"}
UNSAFE_UNLESS_FALSE = {"allow_pickle", "shell", "trust_remote_code"}


def test_nothing_that_is_opened_is_executed() -> None:
    found = {str(path): unsafe_parts(path.read_text()) for path in python_files("kcache", "cli")}
    assert {path: parts for path, parts in found.items() if parts} == {}


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("import pickle", False), ("from pickle import loads", False), ("import torch; torch.load(p)", False),
        ("np.load(p)", False), ("np.load(p, allow_pickle=False)", True), ("np.load(p, allow_pickle=flag)", False),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", False), ("run(c, shell=True)", False),
        ("eval(text)", False), ("exec(text)", False), ("network.eval()", True), ("re.compile(text)", True),
        ("torch.load(p, weights_only=False)", False), ("load(p, weights_only=False)", False),
    ],
)  # fmt: skip
def test_what_executes_is_recognised(code: str, safe: bool) -> None:
    assert (unsafe_parts(code) == []) is safe


def unsafe_parts(code: str) -> list[str]:
    """The imports and calls in `code` that would execute what they open, or that would on request."""
    parts = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            parts += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            parts.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            asks = any(flags.get(flag, "False") != "False" for flag in UNSAFE_UNLESS_FALSE)
            loads = name in ("np.load", "numpy.load") and flags.get("allow_pickle") != "False"
            if name in UNSAFE_CALLS or asks or loads or flags.get("weights_only", "True") != "True":
                parts.append(ast.unparse(node))
    return parts


def test_text_is_read_and_written_as_utf_8_whatever_the_locale_says() -> None:
    unsaid = re.compile(r"\.(read_text|write_text)\((?![^\n]*encoding)|\bopen\(\"[rwax]\+?\"\)|\.open\(\)")
    files = python_files("kcache", "cli")
    assert {path.name for path in files if unsaid.search(path.read_text())} <= {"builder.py"}  # its claims are open()


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def packages() -> list[Path]:
    return sorted(path.parent for path in (ROOT / "kcache").rglob("__init__.py"))


def test_the_readme_maps_every_package_and_the_core_path() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in packages() if f"{path.name}/" not in readme] == []
    core = re.findall(r"^\| \d+ \| `(\w+/\w+\.py)`", readme, re.MULTILINE)
    assert len(core) == 10
    assert sum(len((ROOT / "kcache" / path).read_text().splitlines()) for path in core) <= 2400


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_a_package_has_a_face_that_names_its_files_and_few_of_them(package: Path) -> None:
    modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
    assert len(modules) <= 12
    face = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    if package.name not in ("kcache", "formats"):
        assert [path.stem for path in modules if f"`{path.stem}`" not in face] == []
    assert {path.name: lines for path in modules if (lines := len(path.read_text().splitlines())) > 330} == {}


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    passed_over = [path.name for path in folders for rule in pytestconfig.getini("norecursedirs") if path.match(rule)]
    assert passed_over == []
