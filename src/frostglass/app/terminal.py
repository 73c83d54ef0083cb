"""What a person sees while a run goes on: bars on a terminal, a line per stage when piped. Always on stderr."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

from frostglass.core.events import Emit, Event
from frostglass.core.printable import plain


def listener(*, verbose: int = 0, stream: TextIO | None = None) -> Emit:
    """An Emit for the terminal that `stream` (stderr) is, or for a pipe."""
    out = stream or sys.stderr
    return _Bars(out) if out.isatty() and not verbose else _Lines(out, verbose)


class _Lines:
    """One line per stage; with -v also the progress of each attack."""

    def __init__(self, out: TextIO, verbose: int) -> None:
        self.out, self.verbose = out, verbose

    def __call__(self, event: Event) -> None:
        text = _stage(event)
        if text is None and self.verbose and event.kind == "progress":
            values = "  ".join(f"{k} {v:.4g}" for k, v in event.values.items())
            text = f"    {event.where}  {event.step}/{event.steps}  {values}"
        if text is not None:
            self.out.write(text + "\n")
            self.out.flush()


class _Bars:
    """One bar for the attack at work, one line for each finished cell."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.bar: tqdm[Any] | None = None

    def __call__(self, event: Event) -> None:
        if event.kind == "attack_started":
            self._close()
            self.bar = tqdm(
                total=event.steps, initial=event.step, desc=f"  {event.where[:40]}", file=self.out, leave=False,
                dynamic_ncols=True, unit="step",
            )  # fmt: skip
        elif event.kind == "progress" and self.bar is not None:
            self.bar.update(event.step - self.bar.n)
            shown = {k: f"{v:.3g}" for k, v in list(event.values.items())[:2]}
            self.bar.set_postfix(shown, refresh=True)
        elif event.kind in ("attack_finished", "cell_failed"):
            self._close()
        text = _stage(event)
        if text is not None:
            self._close()
            self.out.write(text + "\n")
            self.out.flush()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _stage(event: Event) -> str | None:
    v = event.values
    if event.kind == "run_started":
        cells = v.get("cells", 0)
        return f"{plain(event.where)}: {cells} cell{'s' if cells != 1 else ''}"
    if event.kind == "cell_started":
        return f"  {plain(str(v.get('title', event.where)))}"
    if event.kind == "cell_finished":
        return f"    {plain(str(v.get('outcome', 'done')))} in {v.get('seconds', 0):.1f} s"
    if event.kind == "cell_failed":
        return f"    FAILED: {plain(str(v.get('error', '')))}"
    if event.kind == "note":
        return f"    {plain(str(v.get('text', '')))}"
    return None
