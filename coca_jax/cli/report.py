"""Writes one page, report.html, of a run and its evaluations into its workdir.

The page is a single file without links to anything: charts are inline SVG, pictures base64 PNG.
It reads what the run left behind: config.json, metrics.jsonl, evaluations.jsonl, eval.json and
eval_examples.json; a part whose file is missing is left out. `train` writes it at its end; this
command writes it anew, after an evaluation for instance. Of several runs it writes one page with
their curves in the same charts and their scores side by side. A file that is no such page is not
written over.

Examples:
  coca-jax report runs/mine
  coca-jax report runs/first runs/second --out=comparison.html
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from absl import flags

from coca_jax.cli import main as cli
from coca_jax.evaluation.report import check_out, write_comparison, write_report

__all__ = ["define_flags", "main", "write_comparison", "write_report"]


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("workdir", None, "The run to report on; the same as naming it alone.")
    flags.DEFINE_string(
        "out", "", "The page; default: report.html in the run, of several comparison.html here."
    )


def summary(result: dict[str, Any]) -> list[str]:
    """Nothing more than what is printed before."""
    del result
    return []


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    args = flags.FLAGS
    folders = ([args.workdir] if args.workdir else []) + list(argv[1:])
    if not folders:
        raise ValueError("give the folder of a run, or of several: coca-jax report DIR [DIR ...]")
    out = args.out or ("" if len(folders) == 1 else "comparison.html")
    if out:
        check_out(out)
    if len(folders) == 1:
        try:
            path = write_report(folders[0], out or None)
        except OSError as error:
            if out or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ValueError(
                f"{error.filename} cannot be written ({error.strerror}). Give another place for "
                "the page: --out=report.html"
            ) from None
    else:
        path = write_comparison(folders, out)
    print(f"wrote {path} ({path.stat().length / 1024:,.0f} KiB)")
    return {"report": str(path)}


if __name__ == "__main__":
    cli.command("report")
