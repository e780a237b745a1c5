"""The chat template of a trained model: recorded in its checkpoint, or in the files of its Hugging Face folder."""

from megazh.conversation.encode import recorded_template, template_for
from megazh.conversation.template import Template
from megazh.errors import UsageError
from megazh.exchange.chat_template import read_chat_template
from megazh.training.model_source import ModelSource


def find_template(source: ModelSource, given: str | None = None) -> Template:
    """The chat template of a model.

    Args:
        source: the model.
        given: a template to take in its place: the name of a built-in one, or a file.

    Raises:
        UsageError: it has none, or one that cannot be used; see `Template`.
        DataError: a file is damaged.
    """
    tokenizer = source.tokenizer()
    if given is not None:
        return template_for(tokenizer, given)
    if (recorded := source.manifest.template) is not None:
        return recorded_template(tokenizer, recorded.jinja, recorded.name)
    found = None if source.hf_files is None else read_chat_template(source.hf_files)
    if found is None:
        raise UsageError(
            f"{source.path}: a base model, which has no chat template: 'megazh sample' continues a text with it, and "
            "--template chatml asks it as if it had been trained on chats"
        )
    return recorded_template(tokenizer, found.jinja, str(source.hf_files), found.eos_token, found.bos_token)
