"""What a person is told beside an answer."""

from megazh.finetune.chat import Answer, Chat, End


def forgotten(answer: Answer, chat: Chat) -> str | None:
    """A line about the turns that the model no longer sees; None where it sees what it saw before."""
    if not answer.forgotten:
        return None
    return (
        f"the oldest {answer.forgotten} turns no longer fit into {chat.model.context:,} tokens; the model forgets them"
    )


def ended(answer: Answer, chat: Chat) -> str | None:
    """A line about an answer that has ended; None where the model ended it, and it has text."""
    if answer.end is End.INTERRUPTED:
        kept = (
            "stays in the conversation as shown" if answer.text.strip() else "is empty, and left out with its question"
        )
        return f"interrupted; the answer {kept}"
    if answer.end is End.MAX_TOKENS:
        return f"cut after {answer.tokens:,} tokens, which is the limit that was set"
    if answer.end is End.CONTEXT:
        return f"cut: the {chat.model.context:,} tokens of the context are full"
    return None if answer.text.strip() else "the answer is empty, and left out with its question"
