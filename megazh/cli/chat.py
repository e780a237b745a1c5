"""`megazh chat`: a conversation with a fine-tuned model, in the terminal, through a pipe, or in a browser."""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megazh.cli.options import Subparsers, add_command, add_device, add_sampling, count, sampling

if TYPE_CHECKING:
    from megazh.finetune.chat import ChatModel, ChatOptions

EXAMPLES = """examples:
  megazh chat runs/demo-sft
  megazh chat runs/demo-sft --temperature 0 --system '你是一个乐于助人的助手。'
  echo '小兔子叫什么名字？' | megazh chat runs/demo-sft       a message a line
  megazh chat models/Qwen1.5-0.5B-Chat --repetition-penalty 1.1
  megazh chat runs/demo-sft --web                      a page on http://127.0.0.1:7860
  megazh chat runs/demo --template chatml              a base model, asked as if it had been trained on chats

In the terminal, /help lists commands. Ctrl-C interrupts an answer, Ctrl-D ends the chat."""

LOOPBACK = "127.0.0.1"


def add_to(commands: Subparsers) -> None:
    """Add `chat`."""
    parser = add_command(commands, "chat", "chat with a fine-tuned model", EXAMPLES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run, checkpoint, imported or Hugging Face folder")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="one of RUN/checkpoints, or its path (default: the newest)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system turn, before all others (default: none)")
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="chatml, human-assistant, or a jinja file (default: the one that the model was trained with)",
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        default=512,
        metavar="N",
        help="largest number of tokens of an answer (default: 512)",
    )
    parser.add_argument(
        "--context",
        type=count,
        metavar="N",
        help="tokens that the model sees at a time; older turns are forgotten (default: those of a training sample)",
    )
    add_sampling(parser)
    parser.add_argument("--web", action="store_true", help="serve a page for a browser (needs the extra 'web', gradio)")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help=f"where --web listens (default: {LOOPBACK}, for this machine alone)",
    )
    parser.add_argument("--port", type=count, default=7860, metavar="N", help="port of --web (default: 7860)")
    add_device(parser)
    parser.set_defaults(call=_chat)


def _chat(options: argparse.Namespace) -> None:
    from megazh.cli.chat_terminal import TerminalChat, chat_by_lines
    from megazh.finetune.chat import Chat, ChatModel, ChatOptions
    from megazh.training.chat_template import find_template
    from megazh.training.model_source import find_model
    from megazh.training.text_model import open_source

    answers = ChatOptions(sampling(options), options.max_tokens, options.seed)
    source = find_model(options.model, options.checkpoint)
    template = find_template(source, options.template)
    warnings = list(template.warnings)
    if options.context is not None and options.context > source.trained_length:
        warnings.append(
            f"--context {options.context}: the model was trained on {source.trained_length:,} tokens at a time, and "
            "may write nonsense behind them"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    graphs = False if options.no_graphs else None
    model = ChatModel(open_source(source, options.device), template, options.context, graphs)
    chat = Chat(model, options.system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `Chat` refuses such text in one line
    title = f"{source.path}: template {template.name}, {model.context:,} tokens of context"
    if options.web:
        _serve(options, model, answers, title)
        return
    if sys.stdin.isatty() and sys.stdout.isatty():
        TerminalChat(chat, answers).run(title)
    else:
        chat_by_lines(chat, answers)


def _serve(options: argparse.Namespace, model: "ChatModel", answers: "ChatOptions", title: str) -> None:
    from megazh.finetune.chat_page import serve

    page = serve(model, answers, options.system, title, options.host, options.port)
    print(f"{title}\n{page.url} (Ctrl-C ends)", flush=True)
    if options.host != LOOPBACK:
        print(f"warning: --host {options.host}: whoever reaches this machine can use the model", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        page.wait()
