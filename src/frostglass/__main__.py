"""`python -m frostglass`: the same as the `frostglass` command."""

from __future__ import annotations

from frostglass.app.cli import main

if __name__ == "__main__":
    main()
