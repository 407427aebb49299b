"""Structured logs on standard error: one line an event, as JSON or for a terminal. Never a text, never a key."""

from __future__ import annotations

import logging
import os
import sys

import structlog
from structlog.typing import Processor

from gateway.telemetry.console import ConsoleRenderer, is_colored

# Libraries whose INFO lines are about their own insides.
_QUIET = ("infinity_emb", "transformers", "sentence_transformers", "huggingface_hub", "httpx", "torch", "uvicorn.error")


def configure_logs(level: str, style: str) -> None:
    """Send the gateway's and every library's log lines through one formatter.

    Args:
        level: the least severe level that is shown.
        style: ``json``, ``console``, or ``auto`` for ``console`` exactly when standard error is a terminal.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    # A bar among the lines: the libraries draw one for each download and for the weights. Read when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    is_console = style == "console" or (style == "auto" and sys.stderr.isatty())
    rendering: list[Processor] = (
        [ConsoleRenderer(has_colors=is_colored(sys.stderr))]
        if is_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    # Infinity clears the root logger's handlers when it is imported: the gateway's own loggers do not depend on them.
    for name in ("", "gateway", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
