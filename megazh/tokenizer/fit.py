"""The process that computes the merges of a BPE tokenizer. `megazh.tokenizer.train` runs this file as a script.

A process of its own, since the library hears no Ctrl-C while it computes: the parent can kill this one at any time.
stdin brings messages of JSON, each after its length in eight bytes: the settings, then lists of texts, then an empty
list. stdout gets one JSON object: `tokenizer`, the contents of a `tokenizer.json`, and `ids`; or `error`. Nothing of
megazh is imported, so that this process starts in a tenth of a second.
"""

import os
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

import orjson


def write_message(file: IO[bytes], value: Any) -> None:
    """Send one message."""
    data = orjson.dumps(value)
    file.write(len(data).to_bytes(8, "little"))
    file.write(data)


def _read_message(file: IO[bytes]) -> Any:
    size = int.from_bytes(file.read(8), "little")
    return orjson.loads(file.read(size))  # raises at the end of the file: the parent has died


def _texts(file: IO[bytes]) -> Iterator[list[str]]:
    while texts := _read_message(file):
        yield texts
    threading.Thread(target=_end_with_parent, args=(file,), daemon=True).start()


def _end_with_parent(file: IO[bytes]) -> None:
    file.read(1)  # returns when the parent has closed its end, which it does only by dying
    os._exit(1)


def _fit(file: IO[bytes]) -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    settings = _read_message(file)
    split = pre_tokenizers.Split(Regex(settings["regex"]), "isolated")
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{settings['longest_word']}}}"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"],
        special_tokens=settings["control_tokens"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(file), trainer)
    # Words are cut for the training only: the time for a merge grows with the words that hold it. The finished
    # tokenizer merges within a word of any length.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return {"ids": tokenizer.get_vocab_size(), "tokenizer": tokenizer.to_str(pretty=False)}


def main() -> None:
    """Train with what comes on stdin."""
    try:
        answer = _fit(sys.stdin.buffer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in native code is not an Exception
        answer = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    sys.stdout.buffer.write(orjson.dumps(answer))
    sys.stdout.buffer.flush()
    os._exit(0)  # the thread that watches the parent would hold up an ordinary end


if __name__ == "__main__":
    main()
