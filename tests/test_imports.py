"""Who may import whom: arrows point one way, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS = [
    {"config", "packing", "processes", "quantize", "tensor_files", "text_files", "remote", "whole_file"},
    {"accumulate", "lora", "shards", "token_batches"},
    {"kernels.pairs", "kernels.blocks"},
    {"kernels.rows", "kernels.long_rows", "kernels.gpu_blocks"},
    {"attention"},
    {"weights", "model"},
    {"sharding"},
    {"adapters", "inference", "losses", "peft_adapter", "checkpoint", "tokenizer"},
    {"torch_checkpoint", "sources", "arguments"},
    {"embedder"},
    {"bulk", "__init__", "kernels.__init__"},
    {"cli"},
]
"""A module of jina_jax imports only from levels above its own line."""

ALLOWED = {  # heavy packages, and the files that may import them
    "torch": {"tensor_files.py", "torch_reference.py", "verify.py"},
    "click": {"cli.py", "__main__.py", "quickstart.py", "mine.py", "evaluate.py", "prepare.py", "compile.py"},
    "pyarrow": {"cli.py", "shards.py", "text_files.py", "records.py"},
    "optax": {"optimizer.py", "step.py"},
    "grain": {"data.py", "loop.py"},
    "tensorflow": set(),
    "tensorflow_datasets": {"datasets.py"},
    "tensorboardX": {"metrics.py"},
    "matplotlib": {"report.py"},
    "peft": set(),
    "sentence_transformers": set(),
}


def imports(path: Path) -> set[tuple[str, int]]:
    """(module, relative level) of every import of a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, 0) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(name or "", node.level) for name in names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module(path: Path) -> str:
    """Name of a module of the library: "model", or "kernels.rows"."""
    return ".".join(path.relative_to(ROOT / "jina_jax").with_suffix("").parts)


def within(path: Path) -> set[str]:
    """The library's modules that one of them imports by relative names."""
    package = module(path).split(".")
    return {".".join([*package[:-level], name]) for name, level in imports(path) if level}


def test_every_module_of_the_library_has_a_level():
    assert {module(path) for path in files("jina_jax")} == set().union(*LEVELS)


@pytest.mark.parametrize("path", files("jina_jax"), ids=module)
def test_the_library_imports_only_what_lies_below(path):
    level = next(i for i, names in enumerate(LEVELS) if module(path) in names)
    below = set().union(*LEVELS[:level])
    assert within(path) <= below
    assert not {name for name, _ in imports(path) if name.split(".")[0] in ("train", "convert", "configs", "benchmarks")}


def test_train_and_convert_do_not_import_each_other():
    for package, other in (("train", "convert"), ("convert", "train")):
        for path in files(package):
            assert not {name for name, _ in imports(path) if name.split(".")[0] == other}, path


@pytest.mark.parametrize("package", ["jina_jax", "convert", "train"])
def test_heavy_packages_stay_where_they_belong(package):
    for path in files(package):
        for name, relative in imports(path):
            if not relative and (top := name.split(".")[0]) in ALLOWED:
                assert path.name in ALLOWED[top], f"{path} imports {top}"


def test_the_library_itself_needs_no_package_of_training():
    for path in files("jina_jax"):
        found = {name.split(".")[0] for name, relative in imports(path) if not relative}
        assert not found & {"optax", "grain", "tensorflow_datasets", "tensorboardX", "matplotlib"}, path


def test_importing_the_library_imports_no_torch():
    code = "import sys, jina_jax; print(sorted({'torch', 'tensorflow', 'click', 'pyarrow', 'optax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert found <= {"optax"}  # flax brings it
