"""A chat in a browser: a page made with gradio (the extra `web`), served on this machine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megazh.errors import UsageError
from megazh.finetune.chat import Answer, Chat, ChatModel, ChatOptions
from megazh.finetune.chat_notes import ended, forgotten
from megazh.model.sampling import SamplingOptions

_FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
_ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
_Shown = tuple[list[dict[str, str]], str, Chat | None, str]
"""Messages, contents of the box, the chat of the session, and a line below the messages."""


@dataclass(frozen=True)
class Page:
    """A page that is served."""

    url: str
    blocks: Any

    def wait(self) -> None:
        """Wait until the process is interrupted, then stop serving."""
        try:
            self.blocks.block_thread()
        finally:
            self.blocks.close(verbose=False)


def serve(model: ChatModel, options: ChatOptions, system: str | None, title: str, host: str, port: int) -> Page:
    """Serve a page where each browser tab has a conversation of its own; answers are written one at a time.

    Args:
        model: the model.
        options: how answers are made, until the person changes it there; the seed stays.
        system: text of the system turn, which the person may change.
        title: title of the page.
        host: address to listen on; only `127.0.0.1` is for this machine alone.
        port: port to listen on.

    Raises:
        UsageError: gradio is not installed, or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ImportError:
        raise UsageError(
            "--web needs gradio, which is not installed: install the extra 'web' (bash jobs/setup.sh --web), or chat "
            "in the terminal, without --web"
        ) from None
    blocks = _page(gradio, model, options, system, title)
    theme = gradio.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])  # fonts that are here
    try:
        _, url, _ = blocks.queue().launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
            theme=theme,
        )
    except OSError as error:
        raise UsageError(f"--port {port}: cannot listen on {host}:{port} ({error}); give another --port") from None
    return Page(url, blocks)


def _page(gradio: Any, model: ChatModel, options: ChatOptions, system: str | None, title: str) -> Any:
    sampling = options.sampling
    with gradio.Blocks(title=title, analytics_enabled=False, fill_height=True) as blocks:
        chat = gradio.State(None)
        gradio.Markdown(f"### {title}")
        messages = gradio.Chatbot(
            elem_id="messages", show_label=False, scale=1, height="60vh", latex_delimiters=[], buttons=["copy"]
        )
        note = gradio.Markdown(elem_id="note")
        with gradio.Row():
            box = gradio.Textbox(
                elem_id="message",
                show_label=False,
                placeholder="Message",
                scale=8,
                lines=1,
                max_lines=12,
                autofocus=True,
            )
            send = gradio.Button("Send", elem_id="send", variant="primary", scale=1, min_width=80)
            stop = gradio.Button("Stop", elem_id="stop", variant="stop", scale=1, min_width=80)
            retry = gradio.Button("Retry", elem_id="retry", scale=1, min_width=80)
            reset = gradio.Button("New", elem_id="reset", scale=1, min_width=80)
        with gradio.Accordion("Settings", open=False, elem_id="settings"):
            settings = [
                gradio.Textbox(system or "", label="System turn", elem_id="system", lines=2),
                gradio.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature (0: greedy)"),
                gradio.Slider(0, 200, sampling.top_k, step=1, label="Top-k (0: all)"),
                gradio.Slider(0.05, 1, sampling.top_p, step=0.01, label="Top-p"),
                gradio.Slider(
                    1, model.context, min(options.max_tokens, model.context), step=1, label="Largest number of tokens",
                    elem_id="max_tokens",
                ),
                gradio.Slider(1, 2, sampling.repetition_penalty, step=0.01, label="Repetition penalty (1: none)"),
                gradio.Slider(0, 5, sampling.additive_penalty, step=0.05, label="Additive penalty (0: none)"),
                gradio.Slider(0, 1, sampling.penalty_decay, step=0.01, label="Its decay per token"),
            ]  # fmt: skip

        def answered(chat: Chat | None, text: str | None, values: tuple[Any, ...]) -> Iterator[_Shown]:
            """Answer a message, or the last one again."""
            try:
                chosen = _options(values, options.seed)
                chat = chat or Chat(model)
                chat.set_system(values[0].strip() or None)
                answer = chat.retry(chosen) if text is None else chat.ask(text, chosen)
            except UsageError as error:
                raise gradio.Error(str(error), title="Not sent") from None
            yield from _written(chat, answer)

        def ask(text: str, chat: Chat | None, *values: Any) -> Iterator[_Shown]:
            yield from answered(chat, text, values)

        def again(chat: Chat | None, *values: Any) -> Iterator[_Shown]:
            yield from answered(chat, None, values)

        def interrupt(chat: Chat | None) -> None:
            if chat is not None:
                chat.interrupt()

        def begin() -> _Shown:
            return [], "", None, ""

        shown = [messages, box, chat, note]
        gradio.on([send.click, box.submit], ask, [box, chat, *settings], shown, **_ONE_AT_A_TIME)
        retry.click(again, [chat, *settings], shown, **_ONE_AT_A_TIME)
        stop.click(interrupt, [chat], None, queue=False, api_visibility="private")
        reset.click(interrupt, [chat], None, queue=False, api_visibility="private").then(
            begin, None, shown, **_ONE_AT_A_TIME
        )
    return blocks


def _options(values: tuple[Any, ...], seed: int) -> ChatOptions:
    """Options by the settings of the page, in their order there."""
    _, temperature, top_k, top_p, max_tokens, repetition, additive, decay = values
    return ChatOptions(
        SamplingOptions(temperature, int(top_k), top_p, repetition, additive, decay), int(max_tokens), seed
    )


def _written(chat: Chat, answer: Answer) -> Iterator[_Shown]:
    """What the page shows while an answer is written, and behind it."""
    before = [*chat.spoken(), {"role": "user", "content": answer.question}]
    note = _in_parentheses(forgotten(answer, chat))
    yield before, "", chat, note
    for piece in answer:
        if piece:
            yield [*before, {"role": "assistant", "content": answer.text}], "", chat, note
    yield chat.spoken(), "", chat, f"{note} {_in_parentheses(ended(answer, chat))}".strip()


def _in_parentheses(line: str | None) -> str:
    return f"({line})" if line else ""
