"""Who may import whom: rooms only rooms below them; heavy packages stay where they belong."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = (
    ("errors",),
    ("storage",),
    ("config", "files"),
    ("model",),
    ("losses", "parallel", "text"),
    ("checkpoints",),
    ("embed",),
    ("bulk", "mteb", "serve"),
    ("adapters", "command"),
    ("__init__",),
    ("commands",),
    ("cli",),
)
"""The floors of jina_jax, from the ground up.

A room imports only from floors below its own, and from itself.
"""

PROGRAMS = (
    ("old_names", "__init__"),
    ("config",),
    ("data",),
    ("step",),
    ("run",),
    ("evaluation", "aot"),
    ("own_task", "mteb"),
    ("__main__", "prepare", "mine", "evaluate", "compile", "quickstart", "pretrain", "adapter"),
)
"""The same of train."""

FLOORS = {"jina_jax": LIBRARY, "train": PROGRAMS}

ALLOWED = {  # heavy packages, and the rooms or files that may import them
    "torch": {"jina_jax/checkpoints/tensor_files.py", "convert/torch_reference.py", "convert/verify.py"},
    "click": {"jina_jax/command.py", "jina_jax/cli.py", "jina_jax/commands", "train", "convert/__main__.py"},
    "pyarrow": {"jina_jax/commands", "jina_jax/bulk", "jina_jax/text/readers.py"},
    "optax": {"train/step"},
    "grain": {"train/data/stream.py", "train/run/loop.py"},
    "tensorflow": set(),
    "tensorflow_datasets": {"train/data/tfds_datasets.py"},
    "tensorboardX": {"train/run/metrics.py"},
    "matplotlib": {"train/evaluation/report.py", "train/mteb/plot.py"},
    "mteb": {"jina_jax/mteb.py", "train/mteb"},
    "datasets": {"train/mteb"},
    **dict.fromkeys(("starlette", "uvicorn", "orjson", "prometheus_client"), {"jina_jax/serve"}),
    "google": {"jina_jax/storage/gcs.py"},
    **dict.fromkeys(("boto3", "botocore"), {"jina_jax/storage/s3.py"}),
    "peft": set(),
    "sentence_transformers": set(),
}

AT_FIRST_USE = {"torch", "transformers", "orbax", "pyarrow", "regex", "mteb", "google", "boto3", "botocore"}
"""Packages that no module of the library imports before they are needed."""


def imports(path: Path, *, top_level: bool = False) -> set[tuple[str, int]]:
    """(module, relative level) of a file's imports; with `top_level`, of none inside functions."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, 0) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
            found |= {(name, node.level) for name in names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The folder or root module that a file is in: "model", "config", "__init__"."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of its own package that a file imports."""
    package = path.relative_to(ROOT).parts[0]
    here = path.relative_to(ROOT).parts[:-1]
    found = set()
    for name, level in imports(path):
        target = [*here[: len(here) - level + 1], *name.split(".")] if level else name.split(".")
        if target[0] == package and len(target) > 1:
            found.add(target[1])
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_every_file_is_in_a_room_with_a_floor(package):
    assert {room(path) for path in files(package)} == {name for floor in FLOORS[package] for name in floor}


@pytest.mark.parametrize("path", [path for package in FLOORS for path in files(package)], ids=place)
def test_a_room_imports_only_what_lies_below(path):
    floors = FLOORS[path.relative_to(ROOT).parts[0]]
    floor = next(i for i, names in enumerate(floors) if room(path) in names)
    below = {name for names in floors[:floor] for name in names}
    assert imported_rooms(path) <= below | {room(path)}


@pytest.mark.parametrize("package", FLOORS)
def test_inside_a_room_no_imports_go_in_circles(package):
    graph = {}
    for path in files(package):
        here = path.relative_to(ROOT).parts[:-1]
        targets = {".".join([*here[: len(here) - level + 1], *name.split(".")]) for name, level in imports(path) if level}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = targets
    known = {
        module: {name for target in targets for name in (target, target.rpartition(".")[0]) if name in graph and name != module}
        for module, targets in graph.items()
    }
    TopologicalSorter(known).prepare()  # CycleError names the circle


def test_programs_import_the_library_and_never_each_other():
    others = {"jina_jax": {"train", "convert"}, "train": {"convert", "configs"}, "convert": {"train", "configs"}}
    for package, forbidden in others.items():
        for path in files(package):
            assert not {name for name, level in imports(path) if not level and name.split(".")[0] in forbidden}, path


@pytest.mark.parametrize("package", ["jina_jax", "convert", "train"])
def test_heavy_packages_stay_where_they_belong(package):
    for path in files(package):
        for name, level in imports(path):
            if not level and (top := name.split(".")[0]) in ALLOWED:
                assert place(path).startswith(tuple(ALLOWED[top])), f"{place(path)} imports {top}"


def test_the_library_imports_its_heaviest_packages_at_first_use():
    for path in files("jina_jax"):
        found = {name.split(".")[0] for name, level in imports(path, top_level=True) if not level}
        assert not found & AT_FIRST_USE, path


def test_importing_the_library_imports_none_of_them():
    heavy = AT_FIRST_USE | ALLOWED.keys()
    code = f"import sys, jina_jax; print(sorted({sorted(heavy)} & sys.modules.keys()))"
    code = code.replace(str(sorted(heavy)), f"set({sorted(heavy)})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert found <= {"optax"}  # flax brings it


def test_one_module_decides_what_is_in_a_bucket():
    """Nothing else looks for a scheme in a path; links in texts are no paths."""
    for package in ("jina_jax", "train", "convert"):
        for path in files(package):
            strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            found = strings & {"://", "gs", "s3", "gs://", "s3://"}
            assert not found or place(path).startswith("jina_jax/storage/"), f"{place(path)} looks for {found}"


def test_messages_name_extras_that_a_checkout_has():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text() for package in ("jina_jax", "convert", "train") for path in files(package)]
    assert not [text for text in texts if "jina-jax[" in text]  # no index has the package
    named = {
        extra for text in texts for listed in re.findall(r"how_to_install\([\"']([^\"']+)", text) for extra in listed.split(",")
    }
    assert named and named <= extras.keys()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("jina_jax", "Embedder ModelConfig Encoder pool make_mesh AdapterParam add_adapter JinaJaxError DataError RunError"),
        ("jina_jax.config", "ModelConfig ConfigError"),
        ("jina_jax.model", "Encoder pool AdapterParam"),
        ("jina_jax.losses", "info_nce cosent masked_lm"),
        ("jina_jax.adapters", "add_adapter drop_adapter extract_adapter fold_adapter merge_adapter"),
        ("jina_jax.checkpoints.tensor_files", "CheckpointError"),
    ],
)
def test_what_users_import_stays_where_it_is(module, names):
    found = importlib.import_module(module)
    assert all(callable(getattr(found, name)) for name in names.split())


def test_every_error_of_the_library_is_a_value_error():
    errors = importlib.import_module("jina_jax.errors")
    children = {errors.ConfigError, errors.CheckpointError, errors.DataError, errors.RunError, errors.BucketError}
    assert set(errors.JinaJaxError.__subclasses__()) >= children and issubclass(errors.JinaJaxError, ValueError)


def test_the_oldest_versions_are_those_that_pyproject_allows():
    """`make test-oldest` runs with exactly these; tokenizers comes with transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    allowed = {re.split(r"[\[><=]", each)[0]: re.search(r">=([\d.]+)", each)[1].split(".") for each in asked}
    lines = (ROOT / "tests" / "oldest_versions.txt").read_text().split()
    oldest = {name: version.split(".") for name, version in (line.split("==") for line in lines)}
    assert oldest.pop("tokenizers")
    assert oldest.keys() == allowed.keys()
    for name, version in oldest.items():
        assert version[: len(allowed[name])] == allowed[name] and set(version[len(allowed[name]) :]) <= {"0"}, name
