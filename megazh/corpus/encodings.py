"""Text encodings other than UTF-8: their names, how a sample is recognised, and how bytes become UTF-8."""

import codecs
import functools

from megazh.errors import UsageError

INVALID = "megazh-invalid"
"""Error handler for decoders: whatever is not valid becomes one lone surrogate, U+DCFF."""
SAMPLE_BYTES = 1 << 16
"""Number of bytes from the start of a file that show its encoding."""

# The names that web browsers give to GB18030, which has all characters of the older standards.
_SAME = {"gb2312": "gb18030", "gbk": "gb18030", "utf-8-sig": "utf-8", "ascii": "utf-8"}
_BOMS = {  # those of UTF-32 first: that of UTF-32-LE begins with that of UTF-16-LE
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CANDIDATES = ("gb18030", "big5", "cp950", "big5hkscs", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
_PUNCTUATION = "　、。，．：；？！“”‘’（）《》〈〉「」『』【】〔〕…—－·～％　０１２３４５６７８９"
_LEAST_COMMON = 0.7  # share of common characters in text that was decoded with the right encoding
_LEAST_EVIDENCE = 4  # characters that are not ASCII; fewer show nothing
_CLEARLY_BETTER = 0.2
_SURELY_COMMON = 0.9  # a share that no text in another language has by chance
_NOT_OF_FILES = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined")

codecs.register_error(INVALID, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


def normal_encoding(name: str) -> str | None:
    """Python's name of an encoding; None for UTF-8, which needs no decoding. GB2312 and GBK are read as GB18030.

    Raises:
        UsageError: no such encoding of text.
    """
    try:
        info = codecs.lookup(name)
        "".encode(info.name)  # raises LookupError for base64 and others that do not encode text
        if info.name in _NOT_OF_FILES:
            raise LookupError
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {name}: no encoding of that name; such as gb18030, big5, utf-16, utf-8, cp1252"
        ) from None
    found = _SAME.get(info.name, info.name)
    return None if found == "utf-8" else found


@functools.cache
def _common() -> frozenset[str]:
    """The common characters of both scripts (level 1 of GB 2312 and Big5) and Chinese punctuation."""
    low, high = [*range(0x40, 0x7F)], [*range(0xA1, 0xFF)]
    pairs = [("gb2312", range(0xB0, 0xD8), high), ("big5", range(0xA4, 0xC7), low + high)]
    text = "".join(
        bytes([first, second]).decode(encoding, "ignore")
        for encoding, firsts, seconds in pairs
        for first in firsts
        for second in seconds
    )
    return frozenset(character for character in text if "\u4e00" <= character <= "\u9fff") | frozenset(_PUNCTUATION)


def commonness(text: str) -> float:
    """Share of common Chinese characters among all that are neither ASCII nor a line break; 1.0 without any."""
    odd = _odd(text)
    return sum(character in _common() for character in odd) / len(odd) if odd else 1.0


def _odd(text: str) -> list[str]:
    return [character for character in text if character >= "\x80" or (character < " " and character not in "\t\n\r\f")]


def decode_sample(sample: bytes, encoding: str, errors: str = "strict") -> str:
    """Decode a sample that may end within a character. Raises UnicodeDecodeError if it is not valid."""
    return codecs.getincrementaldecoder(encoding)(errors).decode(sample)


def byte_order_mark(sample: bytes) -> str | None:
    """The encoding that the byte order mark of a sample names; None without one."""
    return next((encoding for mark, encoding in _BOMS.items() if sample.startswith(mark)), None)


def recognise(sample: bytes) -> str | None:
    """The encoding of a sample of Chinese or English text; None if no encoding is likely.

    UTF-8 that is valid is UTF-8, unless it is full of zero bytes. Otherwise each candidate decodes the sample strictly;
    the one that gives the largest share of common Chinese characters is taken, if that share is 70 % or more. A wrong
    decoder gives rare characters.
    """
    if marked := byte_order_mark(sample):
        return marked
    if 4 * sample.count(0) <= len(sample) and _is_utf8(sample):
        return "utf-8"
    best, best_share = None, 0.0
    for encoding in _CANDIDATES:
        try:
            text = decode_sample(sample, encoding)
        except UnicodeDecodeError:
            continue
        share = commonness(text)
        evidence = text if encoding.startswith("utf") else _odd(text)
        if share > best_share and len(evidence) >= _LEAST_EVIDENCE:
            best, best_share = encoding, share
    return best if best_share >= _LEAST_COMMON else None


def _is_utf8(sample: bytes) -> bool:
    try:
        decode_sample(sample, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def encoding_fault(sample: bytes, given: str | None, is_lines: bool) -> str | None:
    """What is wrong with the encoding of a file, and what to do; None if it can be read.

    A few bytes that are not valid are no fault here: the records that hold them are rejected one by one.

    Args:
        sample: up to `SAMPLE_BYTES` bytes from the start of the file.
        given: the encoding as `normal_encoding` gives it; None for UTF-8.
        is_lines: whether the file has a record per line, of which a few may be bad.
    """
    found, marked = recognise(sample), byte_order_mark(sample)
    if given is None:
        if found in (None, "utf-8") or (is_lines and marked is None and _mostly_utf8(sample)):
            return None
        return f"looks like {found.upper()}, not UTF-8; give --encoding {found}, or convert it: {_iconv(found)}"
    if given in ("utf-16", "utf-32") and marked != given and sample:
        if found in (None, f"{given}-le", f"{given}-be"):
            ends = found.removeprefix(given) if found else "-le or -be"
            return f"has no byte order mark; give --encoding {given}{ends}"
        return _another(found, given)
    text = decode_sample(sample, given, INVALID)
    valid = "\udcff" not in text
    if found is None:
        if valid or commonness(text) >= _LEAST_COMMON:
            return None
        at = len(text[: text.index("\udcff")].encode(given, "ignore"))
        return f"is not {given.upper()}: byte {at:,} is not valid; give another --encoding"
    if marked:
        agrees = marked == given or text.startswith("\ufeff")
    elif found == "utf-8":
        agrees = sample.isascii()
    else:
        share = commonness(decode_sample(sample, found))
        agrees = valid and (
            commonness(text) > share - _CLEARLY_BETTER or (given not in _CANDIDATES and share < _SURELY_COMMON)
        )
    return None if agrees else _another(found, given)


def _another(found: str, given: str) -> str:
    advice = "leave --encoding out" if found == "utf-8" else f"give --encoding {found}, or convert it: {_iconv(found)}"
    return f"looks like {found.upper()}, not {given.upper()}; {advice}"


def _mostly_utf8(sample: bytes) -> bool:
    """Whether most lines that are not ASCII are valid UTF-8, so that the others are just bad lines."""
    lines = [line for line in sample.split(b"\n") if not line.isascii()]
    return 2 * sum(_is_utf8(line) for line in lines) >= len(lines) > 0


def _iconv(encoding: str) -> str:
    return f"iconv -f {encoding.upper()} -t UTF-8"
