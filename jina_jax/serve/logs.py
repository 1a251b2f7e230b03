"""The log of the server: lines of text, or JSON objects."""

import json
import logging
import sys
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One JSON object a line, with the fields of a request where it is one's line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(log_format: LogFormat) -> None:
    """Writes what this package and uvicorn say to standard error, and warnings of all others."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("jina_jax.serve", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
