"""Links from pages to files of the checkout beside docs/: on the site they lead to the repository.

In a checkout and on a code host they are links to the files.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Hook of mkdocs: rewrites the links of a page that lead out of docs/.

    Raises:
        FileNotFoundError: a link leads to no file.
    """
    root = Path(config["docs_dir"]).parent

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if target.startswith("docs/"):
            return link[0]
        if not (root / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which does not exist")
        return f"{link[1]}{config['repo_url'].rstrip('/')}/blob/main/{target}"

    return _LINK.sub(rewritten, markdown)
