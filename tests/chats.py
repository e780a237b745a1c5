"""A small chat model with random weights."""

from decoders import decoder, small
from textdata import tokenizer_path

from megazh.conversation.encode import template_for
from megazh.finetune.chat import ChatModel
from megazh.tokenizer import load_tokenizer
from megazh.training.text_model import TextModel

TOKENIZER = load_tokenizer(tokenizer_path())


def chat_model(template: str = "chatml", context: int = 96) -> ChatModel:
    """A model with random weights."""
    model = decoder(small(vocab_size=TOKENIZER.vocab_size)).eval()
    return ChatModel(TextModel(model, TOKENIZER, context), template_for(TOKENIZER, template))
