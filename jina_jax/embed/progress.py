"""Progress bars."""

from typing import Any


def progress_bar(total: int | None, description: str, unit: str, *, show: bool) -> Any:
    """Returns a bar of tqdm that fits a terminal or a notebook; without a total it only counts."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=not show)
