"""Whether this tree does what another commit does, on this machine.

    python -m benchmarks.same_as 4fe3f70
    python -m benchmarks.same_as 4fe3f70 --skip-speed --json same_as.json

The commit is checked out as a git worktree in a temporary directory. It writes a small model and
begins training runs, which are stopped half-way; then each tree, in processes of its own, embeds
with that model and goes on with copies of those runs.

- Equal bit for bit: embeddings and token states of every task and of mixed tasks, of short texts
  and of long ones, in float32 and bfloat16; model, optimizer and losses at the end of the runs,
  and of runs that this tree does from the beginning.
- The same within 1 %: the cycles that `benchmarks.tpu_estimate` finds for v5e. Left out where
  libtpu is not installed.
- Only reported: the throughput of `benchmarks.cpu_inference`, the trees in turns, the fastest of
  three. A tenth more or less is called noise: a machine with neighbours varies as much.

Exit code 1 where one of the first two differs. Ten minutes on two cores, and forty with the last
two. Needs: pip install -e '.[train]', and for the last two '.[bench,convert,tpu]'.
"""

import contextlib
import importlib.util
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from .machine import machine, versions
from .same_as_worker import CHECKPOINT_EVERY, STEPS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "benchmarks" / "same_as_worker.py"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "grain", "transformers")
TOPOLOGY = "v5e:2x2"
CYCLES_WITHIN = 0.01
SPEED_WITHIN = 0.1
SPEED_ROUNDS = 3
PACKAGES_OF_CORPUS = 150


class Tree(NamedTuple):
    """A checkout, and where its compiled programs are kept; None = nowhere."""

    name: str
    directory: Path
    cache: Path | None

    def run(self, *arguments: Any, cwd: Path) -> str:
        """What Python says, with the packages of this tree."""
        done = subprocess.run(self._command(arguments), cwd=cwd, env=self._environment(), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise click.ClickException(f"{self.name}: python {' '.join(map(str, arguments))} ended with {done.returncode}")
        return done.stdout

    def start(self, *arguments: Any, cwd: Path) -> subprocess.Popen:
        return subprocess.Popen(self._command(arguments), cwd=cwd, env=self._environment(), stdout=subprocess.DEVNULL)

    def _command(self, arguments: tuple[Any, ...]) -> list[str]:
        # -P: nothing is imported that lies beside a program or in `cwd`.
        return [sys.executable, "-P", *map(str, arguments)]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.directory), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.cache)} if self.cache else {}
        inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        return inherited | settings | cache


class Check(NamedTuple):
    """One line of the result."""

    name: str
    before: str
    now: str
    same: bool | None
    """None = left out, or only reported."""
    verdict: str


@click.command()
@click.argument("commit")
@click.option("--skip-speed", is_flag=True, help="Without benchmarks.cpu_inference.")
@click.option("--skip-estimates", is_flag=True, help="Without benchmarks.tpu_estimate.")
@click.option("--texts", type=int, default=128, show_default=True, help="Of benchmarks.cpu_inference.")
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(commit: str, skip_speed: bool, skip_estimates: bool, texts: int, out: Path | None) -> None:
    """Compare this tree with COMMIT, print a table, and write the checks as JSON."""
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="same-as-") as scratch, _worktree(commit, Path(scratch) / "before") as directory:
        before = Tree(commit, directory, Path(scratch) / "compiled" / "before")
        now = Tree("this tree", ROOT, Path(scratch) / "compiled" / "now")
        trees, work = (before, now), Path(scratch) / "work"
        work.mkdir()
        for tree in trees:
            _imported_from(tree, work)
        steps = [partial(_embeddings, trees, work), *(partial(_runs, trees, work, name) for name in STEPS)]
        if not skip_estimates:
            steps.append(partial(_estimates, trees, work))
        if not skip_speed:
            steps.append(partial(_speed, trees, work, texts))
        _write_inputs(before, work)
        checks: list[Check] = []
        for step in steps:
            for check in step():
                click.echo(f"{check.name}: {check.verdict}", err=True)
                checks.append(check)
    click.echo(_table(commit, checks))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_report(commit, checks), indent=1) + "\n", "utf-8")
    sys.exit(any(check.same is False for check in checks))


@contextlib.contextmanager
def _worktree(commit: str, directory: Path) -> Iterator[Path]:
    """A checkout of a commit, and none when it is left."""
    worktree = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*worktree, "add", "--quiet", "--detach", str(directory), commit], capture_output=True, text=True)
    if added.returncode:
        raise click.ClickException(f"git made no worktree of {commit}: {added.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run([*worktree, "remove", "--force", str(directory)], check=True)


def _imported_from(tree: Tree, cwd: Path) -> None:
    """An error where Python would find the packages elsewhere, such as those of an installation."""
    for package in ("jina_jax", "train"):
        found = Path(tree.run("-c", f"import {package}; print({package}.__file__)", cwd=cwd).splitlines()[-1])
        if not found.is_relative_to(tree.directory):
            raise click.ClickException(f"{tree.name}: {package} comes from {found} and not from {tree.directory}")


# ---- what both trees work on


def _write_inputs(before: Tree, work: Path) -> None:
    """`model`, `texts.json` and `records/`."""
    before.run(SHARED, "make", ROOT / "data" / "tokenizer", "model", cwd=work)
    packages = _packages()
    bodies = [text["body"] for package in packages for text in package["text"].values()]
    # Longer than 1,024 tokens, where attention is another program.
    long = [" ".join(bodies[:count]) for count in (12, 30, 60)]
    texts = [*(package["text"]["en"]["title"] for package in packages[:40]), *bodies[:160], *long, ""]
    (work / "texts.json").write_text(json.dumps(texts), "utf-8")
    (work / "records").mkdir()
    for kind, records in _records(packages).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (work / "records" / f"{kind}.jsonl").write_text(lines, "utf-8")


def _packages() -> list[dict[str, Any]]:
    """Some packages of the corpus, and nothing of either tree to read them with."""
    with lzma.open(ROOT / "data" / "debian_packages.jsonl.xz", "rt", encoding="utf-8") as lines:
        packages = [package for package in map(json.loads, lines) if package["split"] == "train"]
    return random.Random(0).sample(packages, PACKAGES_OF_CORPUS)


def _records(packages: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of every kind."""
    rng = random.Random(1)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("text", "pair", "triplet", "scored_pair", "labelled_text")}
    for package in packages:
        for language, text in package["text"].items():
            others = [other["text"]["en"]["body"] for other in rng.sample(packages, 3)]
            whole, common = f"{text['title']}\n{text['body']}", {"language": language, "group": package["source"]}
            pair = {"anchor": text["title"], "positive": text["body"]}
            found["text"].append({"text": whole, "language": language})
            found["pair"].append(pair | common)
            found["triplet"].append(pair | {"negatives": others} | common)
            found["scored_pair"].append({"sentence1": whole, "sentence2": others[0], "score": rng.random()} | common)
            found["labelled_text"].append({"text": whole, "label": package["section"]} | common)
    return found


# ---- embeddings


def _embeddings(trees: tuple[Tree, Tree], work: Path) -> Iterator[Check]:
    """One check for each dtype."""
    found = []
    for number, tree in enumerate(trees):
        tree.run(SHARED, "embed", "model", "texts.json", f"embeddings{number}.npz", cwd=work)
        with np.load(work / f"embeddings{number}.npz") as arrays:
            found.append(dict(arrays))
    for dtype in ("float32", "bfloat16"):
        before, now = ({name: x for name, x in arrays.items() if name.startswith(dtype)} for arrays in found)
        yield _equal(f"embeddings, {dtype}", before, now)


# ---- runs


def _runs(trees: tuple[Tree, Tree], work: Path, name: str) -> Iterator[Check]:
    """A run that the first tree begins and each goes on with, and the second also does anew."""
    half = work / f"{name}-half"
    step = _begin(trees[0], work, name, half)
    before, now, anew = (work / f"{name}-{whose}" for whose in ("before", "now", "anew"))
    for workdir in (before, now):
        shutil.copytree(half, workdir)
    for tree, workdir in ((trees[0], before), (trees[1], now), (trees[1], anew)):
        tree.run("-m", "train", f"{SHARED}:{name}", "--workdir", workdir, cwd=work)
    for label, workdir in ((f"gone on with from step {step} of {STEPS[name]}", now), ("from the beginning", anew)):
        yield _equal(f"run {name}, {label}: model", _arrays(before / "model"), _arrays(workdir / "model"))
        checkpoints = (sorted((each / "checkpoints").glob("[0-9]*"))[-1] for each in (before, workdir))
        yield _equal(f"run {name}, {label}: parameters and optimizer", *map(_arrays, checkpoints))
        yield _equal_steps(f"run {name}, {label}: losses, gradients, rates", *map(_metrics, (before, workdir)))
    for workdir in (half, before, now, anew):
        shutil.rmtree(workdir)


def _begin(tree: Tree, work: Path, name: str, workdir: Path) -> int:
    """Starts a run and asks it to end after its second checkpoint; the step at which it did."""
    process = tree.start("-m", "train", f"{SHARED}:{name}", "--workdir", workdir, cwd=work)
    second = workdir / "checkpoints" / f"{2 * CHECKPOINT_EVERY:08d}"
    while process.poll() is None and not second.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if process.wait() or (workdir / "model").exists():
        raise click.ClickException(f"{tree.name}: run {name} ended before it was asked to, with {process.returncode}")
    return max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


def _arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Those of a model or of a training checkpoint, by name."""
    directory = str(checkpoint.absolute() / "arrays")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = ocp.metadata(directory).metadata
    whole = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for name, array in stored.items()}
    return {name: np.asarray(array) for name, array in ocp.load(directory, whole).items()}


def _metrics(workdir: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text("utf-8").splitlines())
    return [tuple(line[key] for key in ("step", "stage", "loss", "grad_norm", "learning_rate")) for line in lines]


# ---- estimates and speed


def _estimates(trees: tuple[Tree, Tree], work: Path) -> Iterator[Check]:
    """Cycles of every program of benchmarks.tpu_estimate on one chip."""
    if importlib.util.find_spec("libtpu") is None:
        yield Check("estimated cycles", "", "", None, "left out: libtpu is not installed")
        return
    found = []
    for number, tree in enumerate(trees):
        out = work / f"estimates{number}.json"
        # A program that is not compiled leaves none of the schedules which the estimate reads.
        tree = tree._replace(cache=None)
        tree.run("-m", "benchmarks.tpu_estimate", "--topology", TOPOLOGY, "--json", out, cwd=tree.directory)
        results = json.loads(out.read_text("utf-8"))["results"]
        found.append({each["program"]: each["mcycles"] for each in results})
    before, now = found
    for program in before | now:
        name = f"Mcycles, {TOPOLOGY}, {program}"
        if program not in before or program not in now:
            yield Check(name, str(before.get(program, "")), str(now.get(program, "")), False, "only one has this program")
            continue
        change = now[program] / before[program] - 1
        same = abs(change) <= CYCLES_WITHIN
        yield Check(name, f"{before[program]:.2f}", f"{now[program]:.2f}", same, f"{change:+.2%}")


def _speed(trees: tuple[Tree, Tree], work: Path, texts: int) -> Iterator[Check]:
    """Tokens per second with the model of the published size that the first tree writes."""
    module = ("-m", "benchmarks.cpu_inference")
    trees[0].run(*module, "make", work / "published", cwd=trees[0].directory)
    for dtype in ("float32", "bfloat16"):
        fastest = [0.0, 0.0]
        for turn in range(SPEED_ROUNDS):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                tree = trees[number]
                arguments = "worker", "jina-jax", work / "published", dtype, texts, time.time()
                numbers = json.loads(tree.run(*module, *arguments, cwd=tree.directory).splitlines()[-1])
                fastest[number] = max(fastest[number], numbers["tokens_per_s"])
        ratio = fastest[1] / fastest[0]
        noise = "within noise" if abs(ratio - 1) <= SPEED_WITHIN else "NOT within noise"
        yield Check(f"tokens/s on CPU, {dtype}", f"{fastest[0]:.0f}", f"{fastest[1]:.0f}", None, f"x {ratio:.3f}, {noise}")


# ---- comparisons


def _equal(name: str, before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> Check:
    """Arrays by name, bit for bit."""
    differing = []
    for key in before | now:
        if key not in before or key not in now:
            differing.append(f"{key}: only in one")
        elif (before[key].shape, before[key].dtype) != (now[key].shape, now[key].dtype):
            differing.append(f"{key}: {before[key].dtype}{before[key].shape} and {now[key].dtype}{now[key].shape}")
        elif before[key].tobytes() != now[key].tobytes():
            distance = np.abs(before[key].astype(np.float64) - now[key].astype(np.float64)).max()
            differing.append(f"{key}: up to {distance:.1e} apart")
    verdict = "equal" if not differing else f"{len(differing)} differ: {'; '.join(differing[:3])}"
    return Check(name, f"{len(before)} arrays", f"{len(now)} arrays", not differing, verdict)


def _equal_steps(name: str, before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> Check:
    differing = [f"{one} and {other}" for one, other in zip(before, now, strict=False) if one != other]
    same = not differing and len(before) == len(now)
    verdict = "equal" if same else f"{len(differing)} differ: {'; '.join(differing[:1])}"
    return Check(name, f"{len(before)} steps", f"{len(now)} steps", same, verdict)


def _table(commit: str, checks: list[Check]) -> str:
    lines = [f"| check | {commit} | this tree | |", "|---|---:|---:|---|"]
    return "\n".join([*lines, *(f"| {check.name} | {check.before} | {check.now} | {check.verdict} |" for check in checks)])


def _report(commit: str, checks: list[Check]) -> dict[str, Any]:
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], check=True, capture_output=True, text=True
    )
    return {
        "machine": machine(),
        "date": str(date.today()),
        "versions": versions(PACKAGES),
        "before": commit,
        "now": described.stdout.strip(),
        "checks": [check._asdict() for check in checks],
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.same_as")
