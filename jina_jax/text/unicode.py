"""Finds strings that are not valid Unicode text."""


def lone_surrogate(text: str) -> int | None:
    """Position of the first lone surrogate, which no encoding can write; None if there is none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
