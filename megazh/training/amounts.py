"""Types of recipe keys: a part of a run as share, steps or tokens, and numbers that change with the tokens consumed."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from megazh.config import parse_amount


def _span(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    if isinstance(value, str) and value[-1:].isalpha():
        parse_amount(value)
        return value
    raise ValueError(f"expected steps, tokens such as 2M, or a share below 1, found {value!r}")


Span = Annotated[float | str, BeforeValidator(_span)]
"""A part of a run: a share of its steps below 1, steps from 1 on, or tokens as text with a unit, such as `2M`."""


def _by_tokens(value: Any) -> Any:
    if not isinstance(value, dict):
        torn = " (on the command line, in quotes)" if isinstance(value, str) and ":" in value else ""
        raise ValueError(f"expected numbers by tokens, such as {{0: 128, 2B: 256}}{torn}, found {value!r}")
    found: dict[int, Any] = {}
    for key, number in value.items():
        if number is None and ":" in str(key):
            raise ValueError(f"{key}: write a blank after the colon, as in {{0: 128, 2B: 256}}")
        tokens = _tokens(key)
        if tokens in found:
            raise ValueError(f"{key!r} is given twice")
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{key}: expected a whole number, found {number!r}")
        found[tokens] = number
    return dict(sorted(found.items()))


def _tokens(key: Any) -> int:
    if isinstance(key, float) and key.is_integer():  # 1e9
        key = int(key)
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    return 0 if key == "0" else parse_amount(str(key))


ByTokens = Annotated[dict[int, int], BeforeValidator(_by_tokens)]
"""Numbers by the tokens that a run has consumed, such as `{0: 128, 2B: 256}`; sorted."""
