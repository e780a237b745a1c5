"""A `tokenizer.json` like that of Llama models: spaces written as `▁`, rare characters as one token per byte."""

import json
from pathlib import Path

PIECES = ["▁", "▁今天", "天", "气", "▁hello", "lo", "x", "▁▁"]


def write_byte_fallback_json(path: Path) -> Path:
    """Write a tokenizer whose ids 0 to 2 are control tokens, 3 to 258 bytes, and 259 onwards `PIECES`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    added = [
        {
            "id": number,
            "content": tokens[number],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number in range(3)
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    settings = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [],
        },
    }
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return path
