"""Runs the steps of the Containerfile in an empty Debian root, where there is no container engine.

    debootstrap --variant=minbase bookworm ROOT
    python deploy/run_steps.py ROOT [--carry /etc/pip.conf ...] [--env PIP_CERT=... ...]
    chroot ROOT /opt/jina-jax/bin/jina-jax serve --help

It needs root. Of the Containerfile's instructions it knows those that are used: ARG, RUN, COPY and
ENV are carried out, the others say how a container starts.
"""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
STARTS = ("FROM", "USER", "EXPOSE", "ENTRYPOINT")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    """Carry out all steps, and stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--carry", type=Path, action="append", default=[], help="file of this machine that is copied there")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE in the environment of the steps")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if not (root / "etc" / "debian_version").exists():
        raise SystemExit(f"{root} is no Debian root: make one with debootstrap")
    for file in [Path("/etc/resolv.conf"), *arguments.carry]:
        _copy(file, root, str(file))
    environment = {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"} | dict(each.split("=", 1) for each in arguments.env)
    for name, rest in _instructions((HERE / "Containerfile").read_text()):
        print(f"{name} {rest}", flush=True)
        if name in ("ARG", "ENV"):
            environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif name == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                _copy(HERE.parent / source, root, target)
        elif name == "RUN":
            subprocess.run(["chroot", str(root), "/bin/sh", "-ec", rest], check=True, env=environment)
        elif name not in STARTS:
            raise SystemExit(f"the Containerfile has an instruction that is not known here: {name}")


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip() and not line.startswith("#")]


def _copy(source: Path, root: Path, target: str) -> None:
    """Copies a file, or what is in a folder, as COPY does: a target with a slash at its end is a
    folder."""
    place = root / target.lstrip("/")
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        return
    place = place / source.name if target.endswith("/") else place
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, place)


if __name__ == "__main__":
    main()
