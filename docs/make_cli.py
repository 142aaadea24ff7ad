"""Write docs/cli.md from the commands' own --help: python docs/make_cli.py. tests/test_docs.py compares the two."""

from __future__ import annotations

from pathlib import Path

import click

from diablo_export.cli import COMMANDS, main

FILE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Made from `--help` by `python docs/make_cli.py`.

Exit codes: 0 done and every check held; 1 a parity or survival check failed (the output stays, its report says so),
`inspect` found that adapter and model do not fit, or `doctor` something broken; 2 bad input or usage, or what cannot be
read or written, in one message; 130 interrupted. Results go to standard output, messages and progress to standard
error. Models given as Hugging Face ids are fetched into the local cache; `HF_HUB_OFFLINE=1` keeps to what is there.
"""


def render() -> str:
    """The whole page."""
    root = click.Context(main, info_name="diablo-export", terminal_width=100, max_content_width=100)
    root.help_option_names = main.context_settings["help_option_names"]
    parts = [HEAD, _section(main, root)]
    for name in COMMANDS:
        command = main.get_command(root, name)
        assert command is not None
        settings = {**command.context_settings, "terminal_width": 100, "max_content_width": 100}
        context = click.Context(command, root, name, **settings)
        parts.append(_section(command, context))
        for below, one in command.commands.items() if isinstance(command, click.Group) else ():
            parts.append(_section(one, click.Context(one, context, below, **settings)))
    return "\n".join(parts)


def _section(command: click.Command, context: click.Context) -> str:
    return f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
