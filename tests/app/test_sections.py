"""`frostglass --help` names every command once, whole, in a terminal of 80 columns."""

from __future__ import annotations

import re

import click
import pytest

from command_line import call
from frostglass.app.cli import cli
from frostglass.app.sections import LONGEST, SECTIONS


def test_every_command_is_listed_once_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = call(capsys, "--help")
    assert code == 0
    assert "..." not in text.split("ARGS]...")[1]
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  ([a-z-]+) +\S", text.split("Start here:")[1], re.M)
    assert sorted(listed) == sorted(cli.commands)
    assert [n for names in SECTIONS.values() for n in names] == listed
    assert all(c.short_help and len(c.short_help) <= LONGEST for c in cli.commands.values())


def test_a_command_that_no_heading_names_comes_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.commands, "extra", click.Command("extra", help="Of another package."))
    assert re.search(r"Others:\n  extra +Of another package\.\n$", call(capsys, "--help")[1])
