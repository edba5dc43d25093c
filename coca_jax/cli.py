"""How every command starts and ends: absl flags, one-line errors, exit status 2 for bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> None:
    """Runs `main(argv)`; prints its result as the last line of standard output, as one JSON object.

    A ValueError or OSError is bad input: it becomes one line on standard error and exit
    status 2. Anything else is a defect and keeps its traceback.
    """

    def wrapped(argv: Sequence[str]) -> None:
        # Libraries log every step of a save at INFO; --verbosity=0 brings that back.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            result = main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        if result is not None:
            print(json.dumps(result), flush=True)

    app.run(wrapped, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; an unknown flag or key, or a value of the wrong type, is a line and exit 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = " ".join(str(error).replace("\\'", "'").replace("\\n", " ").split())
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
