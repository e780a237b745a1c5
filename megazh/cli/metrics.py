"""`megazh metrics`: the records of a run as a table."""

import argparse
import sys
from pathlib import Path

from megazh.cli.options import Subparsers, add_command, writing_output
from megazh.errors import UsageError

EXAMPLES = """examples:
  megazh metrics runs/demo                                          what is recorded
  megazh metrics runs/demo --csv steps.csv
  megazh metrics runs/demo --csv validations.csv --kind validation  a column for each corpus and figure
  megazh metrics runs/demo --csv - --kind event | head

docs/metrics.md says what the columns are. Curves: megazh plot."""


def add_to(commands: Subparsers) -> None:
    """Add `metrics`."""
    parser = add_command(commands, "metrics", "the records of a run as a table", EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--csv", metavar="FILE", help="write comma-separated values; - for standard output")
    parser.add_argument(
        "--kind", choices=["step", "validation", "sample", "event"], default="step", help="rows (default: step)"
    )
    parser.set_defaults(call=_metrics)


def _metrics(options: argparse.Namespace) -> None:
    from megazh.files import write_atomic
    from megazh.run.csv_export import describe, table
    from megazh.run.metrics import METRICS, read_metrics

    records = read_metrics(options.run)
    if not records:
        raise UsageError(f"{options.run}: nothing is recorded yet; let the run take a step first")
    if options.csv is None:
        print("\n".join(describe(records)))
        return
    text = table(records, options.kind)
    if options.csv == "-":
        sys.stdout.write(text)
        return
    output = Path(options.csv)
    if output.resolve() == (options.run / METRICS).resolve():
        raise UsageError(f"--csv {options.csv}: the records of the run themselves; give another file")
    with writing_output("--csv", output):
        write_atomic(output, text.encode())
    rows = sum(record["kind"] == options.kind for record in records)
    print(f"{options.csv}: {rows:,} rows")
