"""Command line: `jina-jax`."""

import sys

from .errors import how_to_install

try:
    import click
except ImportError:
    sys.exit(f"the command line needs an extra: {how_to_install('cli')}")

from .command import CommandGroup
from .commands.demo_model import demo_model
from .commands.embed import embed
from .commands.info import info
from .commands.search import search
from .commands.serve import serve


@click.group(cls=CommandGroup)
@click.version_option(package_name="jina-jax")
def main() -> None:
    """Task-adapted multilingual embeddings in JAX.

    \b
    To begin with, without a network where the extra `demo` is installed:
      jina-jax demo-model runs/e5-small
      jina-jax search "how do I edit a photo?" texts.txt --model runs/e5-small
    """


for command in (search, embed, serve, info, demo_model):
    main.add_command(command)

if __name__ == "__main__":
    main()
