"""The tag `{% generation %}` of `transformers`, which some templates put around the text of answers."""

from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class Generation(Extension):
    """Renders what stands between `{% generation %}` and `{% endgeneration %}`.

    `transformers` takes its mask of trained tokens from the tag; here the mask follows from the turns.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The node of a block that begins at the parser's place."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()
