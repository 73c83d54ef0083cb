"""The list of commands in `frostglass --help`, by what a person wants to do."""

from __future__ import annotations

import click

SECTIONS = {
    "Start here": ("demo", "init", "list"),
    "See through": ("audit", "report", "audit-updates", "unmix", "challenge", "fit-generator", "fit-similarity"),
    "Hide": ("encode", "public-pool", "train", "cost", "check-checkpoint"),
    "Train together": ("federate", "collaborate"),
    "Say what holds": ("sweep", "bound", "check"),
}
LONGEST = 56
"""Characters of a command's `short_help`, so that it stands whole in a terminal of 80."""


class Sections(click.Group):
    """A group whose commands are listed under headings; those that no heading names come last."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes them, each with its short help."""
        named = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in self.list_commands(context) if name not in named)
        width = max(map(len, named))  # the same under all headings
        for title, names in {**SECTIONS, "Others": others}.items():
            shown = [
                (n.ljust(width), c.get_short_help_str(LONGEST)) for n in names if (c := self.get_command(context, n))
            ]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)
