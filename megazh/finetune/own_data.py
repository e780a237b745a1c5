"""The user's own conversations, converted once for a run; the same call again only checks that they are the same."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megazh.conversation.reading import DataSets
from megazh.conversation.registry import DataSet
from megazh.errors import DataError, UsageError
from megazh.files import known_sha256
from megazh.finetune.conversion_folder import MANIFEST
from megazh.finetune.convert import Request, convert
from megazh.finetune.fit import Drop
from megazh.index.manifest import load_manifest
from megazh.index.metadata import Metadata, read_metadata


def prepare_conversations(request: Request, say: Callable[[str], None]) -> Path:
    """Convert conversations into a folder, unless that was done before; returns the path of the manifest.

    Args:
        request: what to convert, how, and where to.
        say: called with each line for the person at the terminal.

    Raises:
        UsageError: as `convert`; or the folder was converted from other files, with another template or length.
        DataError: as `convert`; or a file of the folder is missing or damaged.
    """
    manifest = request.output / MANIFEST
    if not manifest.exists():
        return convert(request, say)
    there = {entry.name: entry.prefix for entry in load_manifest(manifest).corpora}
    wanted = {each.name: each for each in request.sets}
    if there.keys() != wanted.keys():
        raise _differs(request, f"sets {', '.join(there)}, and this run has {', '.join(wanted)}")
    for name, prefix in there.items():
        metadata = read_metadata(request.output / prefix)
        if metadata is None:
            raise DataError(f"{request.output / prefix}.json: missing; remove {request.output} to convert -i anew")
        _check_same(request, wanted[name], metadata)
        if Drop.BEHIND_A_BREAK.value in metadata.rejected.reasons:
            say(
                f"warning: {request.output / prefix}: a file was broken off when it was converted, and all behind the "
                f"break is missing; repair the file and remove {request.output} to convert it anew"
            )
    say(f"data: converted already, from the same conversations: {manifest}")
    return manifest


def _check_same(request: Request, data_set: DataSet, metadata: Metadata) -> None:
    fitting, template = request.fitting, metadata.template
    if template is None or template.jinja != fitting.template.jinja:
        raise _differs(request, f"template {template.name if template else 'none'}, not {fitting.template.name}")
    for key, before, now in (
        ("tokenizer", metadata.tokenizer.fingerprint, fitting.tokenizer.fingerprint),
        ("max_tokens", metadata.options.max_tokens, fitting.max_tokens),
        ("train", metadata.options.train, fitting.train.value),
        ("noise", metadata.options.noise, None if request.noise is None else asdict(request.noise)),
        ("copies", metadata.options.copies or 1, request.copies),
    ):
        if before != now:
            raise _differs(request, f"{key} {before}, not {now}")
    if metadata.options.data_set != data_set.fingerprint:
        raise _differs(request, f"another entry of '{data_set.name}' in its registry")
    sources = DataSets([data_set], request.format, request.encoding).sources
    before_it = {source.name: source.sha256 for source in metadata.sources}
    now_given = {source.name: source for source in sources}
    for name in sorted(before_it.keys() | now_given.keys()):
        if name not in now_given:
            raise _differs(request, f"{name}, which is no longer given")
        if name not in before_it:
            raise _differs(request, f"files without {name}")
        if known_sha256(now_given[name].path) != before_it[name]:
            raise _differs(request, f"{name}, which has changed since")


def _differs(request: Request, found: str) -> UsageError:
    return UsageError(
        f"{request.output}: was converted from other conversations ({found}); choose another run with -r, or remove "
        "the folder"
    )
