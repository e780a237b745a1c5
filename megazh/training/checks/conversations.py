"""Whether the conversations of a run fit its length, from the description of each index alone."""

from collections.abc import Iterator

from megazh.training.checks.data import needed_facts
from megazh.training.job import Case


def lengths(case: Case) -> Iterator[str]:
    """No conversation is longer than a sample: packing would cut it anywhere, not at a turn."""
    found = needed_facts(case)
    if found is None:
        return
    seq_len = case.recipe.batch.seq_len
    least = 1 << (seq_len - 1).bit_length()  # lengths are counted by powers of two; those below may all fit
    for corpus in found.corpora:
        data = corpus.metadata
        limit = data.options.max_tokens
        count = sum(number for low, number in data.token_length_histogram.items() if int(low) >= least)
        if data.template is not None and count and (limit is None or limit > seq_len):
            yield case.settings.with_places(
                f"warning: corpus '{corpus.entry.name}': {count:,} conversations have {least:,} tokens or more, and "
                f"what is longer than batch.seq_len={seq_len} is cut anywhere, not at a turn; convert them with "
                f"--max-tokens {seq_len}"
            )
