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
    """Task-adapted multilingual embeddings in JAX."""


main.add_command(demo_model)
main.add_command(embed)
main.add_command(info)
main.add_command(search)
main.add_command(serve)

if __name__ == "__main__":
    main()
