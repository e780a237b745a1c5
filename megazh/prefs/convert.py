"""Preference data in the forms in which it is passed around, rewritten as the rows that TRL's trainers read."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megazh.conversation.faults import RowError
from megazh.conversation.rejects import Rejects, RowFile, new_rows, rejected_path
from megazh.conversation.rows import find_rows, read_rows
from megazh.corpus.formats import Format
from megazh.corpus.options import ReadOptions
from megazh.corpus.sources import Source
from megazh.errors import Collector, DataError
from megazh.prefs.files import check_output
from megazh.prefs.forms import Form, Template, trl_row
from megazh.prefs.rows import preference_of
from megazh.progress import Progress


def convert(
    inputs: Sequence[str],
    output: Path,
    say: Callable[[str], None],
    form: Form = Form.TEXT,
    template: Template | None = None,
    format: Format | None = None,
    encoding: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write `output`, a JSONL file of `prompt`, `chosen`, `rejected`, from preference data.

    Rows that give none are written to `OUT.rejected.jsonl` with file, line, reason and detail. Of a damaged file, all
    whole rows before the damage are written, and then the error is raised.

    Args:
        inputs: files, folders and globs: JSON, JSONL, Parquet, Arrow, also compressed.
        output: the file to write.
        say: called with each line for the person at the terminal: what was left out, and counts at the end.
        form: form of the rows.
        template: how plain text is made of an instruction and its input.
        format: format of all files; by default, each file's suffix decides.
        encoding: encoding of JSON and JSONL, as `megazh.corpus.encodings.normal_encoding` gives it.
        overwrite: whether to replace an output that is there.

    Raises:
        UsageError: an input or the output cannot work.
        DataError: a file is damaged, or no row is good.
        WriteError: the output cannot be written.
    """
    listing, options = find_rows(inputs, format, encoding)
    check_output(output, listing.sources, overwrite)
    for line in listing.notes():
        say(line)
    template = template or Template()
    damaged: list[DataError] = []
    with (
        new_rows(output) as rows,
        Rejects(rejected_path(output)) as rejects,
        Progress("converting", sum(source.size for source in listing.sources)) as progress,
    ):
        for source in listing.sources:
            try:
                _convert_file(source, options, form, template, rows, rejects, progress)
            except DataError as error:
                damaged.append(error)
        rejects.commit()
        if rows.rows:
            rows.commit()
        elif not damaged:
            raise DataError(_nothing(rejects))
    kept = ""
    if rows.rows:
        say(f"{output}: {rows.rows:,} rows of prompt, chosen, rejected")
        kept = f"; {output} has the {rows.rows:,} rows that could be read"
    if rejects.total:
        say(f"{rejects.path}: {rejects.total:,} rejected rows: {rejects.describe()}")
    errors = Collector()
    for each in damaged:
        errors.add(DataError(f"{each}{kept}"))
    errors.raise_all()


def _convert_file(
    source: Source,
    options: ReadOptions,
    form: Form,
    template: Template,
    rows: RowFile,
    rejects: Rejects,
    progress: Progress,
) -> None:
    before = 0
    for row in read_rows(source, options):
        try:
            if isinstance(row.value, RowError):
                raise row.value
            rows.add(trl_row(preference_of(row.value), form, template))
        except RowError as error:
            rejects.add(source.name, row.line, error)
        progress.advance(row.position - before)
        before = row.position
    progress.advance(source.size - before)


def _nothing(rejects: Rejects) -> str:
    if not rejects.total:
        return "no row in the input"
    return f"no row can be used: {rejects.describe()}; first: {rejects.first}; all in {rejects.path}"
