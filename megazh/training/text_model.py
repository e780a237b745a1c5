"""A trained model, opened from its folder for generation."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megazh.errors import UsageError
from megazh.exchange.generation_config import end_ids
from megazh.model.decoder import Decoder
from megazh.model.generate import cached_forward, generate, uncached_forward
from megazh.model.sampling import SamplingOptions
from megazh.tokenizer import Tokenizer
from megazh.tokenizer.stream import TextStream
from megazh.training.model_source import ModelSource, find_model
from megazh.training.weights import load_decoder


class TextModel:
    """A model with its tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        trained_length: tokens per sample that the model was trained on.
        end_ids: ids of the tokens at which texts end. Default: the end-of-document token.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, trained_length: int, end_ids: frozenset[int] | None = None
    ) -> None:
        self.model, self.tokenizer, self.trained_length = model, tokenizer, trained_length
        self.end_ids = frozenset([tokenizer.eod_id]) if end_ids is None else end_ids

    def warning(self, prompt: str) -> str | None:
        """A line about a prompt of more tokens than the model ever saw at once; None for others."""
        count = len(self.tokenizer.encode(prompt))
        if count < self.trained_length:
            return None
        return (
            f"warning: the prompt has {count:,} tokens, and the model was trained on {self.trained_length:,} at a "
            "time: it was never trained to go on behind so many, and may write nonsense; give a shorter prompt"
        )

    def stream(
        self,
        prompt: str,
        count: int,
        options: SamplingOptions,
        seed: int,
        stop_at_end: bool = True,
        cached: bool = True,
        graphs: bool | None = None,
    ) -> Iterator[str]:
        """Yield a continuation of `prompt`: one piece of text per token, perhaps empty, never half a character.

        Args:
            prompt: text to continue.
            count: largest number of tokens to generate.
            options: sampling options.
            seed: seed of the random draws.
            stop_at_end: whether to stop where the model ends the document.
            cached: whether to keep keys and values of earlier tokens; without them the same text takes longer.
            graphs: whether to record CUDA graphs; see `megazh.model.decode`. Default: on CUDA.
        """
        ids = self.tokenizer.encode(prompt)
        capacity = len(ids) + count
        forward = cached_forward(self.model, capacity, graphs) if cached else uncached_forward(self.model)
        ends = self.end_ids if stop_at_end else frozenset[int]()
        text = TextStream(self.tokenizer, ids)
        for token in generate(forward, ids, count, options, self.tokenizer.vocab_size, ends, seed):
            yield text.put(token)
        yield text.end()


def open_model(path: Path, checkpoint: str | None = None, device: str | None = None) -> TextModel:
    """Open a model. Texts of a Hugging Face folder end where its generation_config.json says.

    Args:
        path: a run folder, the folder of one checkpoint, an imported folder, or a Hugging Face folder.
        checkpoint: of a run, the name or path of one of its checkpoints. Default: the newest.
        device: `cpu` or `cuda`. Default: CUDA where torch can use it.

    Raises:
        UsageError: no model, no such checkpoint, no tokenizer, or no usable GPU.
        DataError: a file is damaged.
    """
    return open_source(find_model(path, checkpoint), device)


def open_source(source: ModelSource, device: str | None = None) -> TextModel:
    """Open a model that was found. Arguments and errors as of `open_model`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch can use no GPU here; leave it out, or give --device cpu")
    tokenizer = source.tokenizer()
    ends = None if source.run is not None or source.hf_files is None else end_ids(source.hf_files)
    if (template := source.manifest.template) is not None:
        ends = frozenset(id for id in (tokenizer.control_id(template.stop), tokenizer.eod_id) if id is not None)
    return TextModel(load_decoder(source, torch.device(device)), tokenizer, source.trained_length, ends)
