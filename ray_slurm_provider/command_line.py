"""What was typed: some of Ray's options do not reach its providers in any other way."""

from __future__ import annotations

import sys

# Options of `ray` itself that stand before the command and take a value (ray/scripts/scripts.py, cli).
_WITH_VALUE = frozenset({"--logging-level", "--logging-format"})


def ray_command() -> str:
    """Return the command in ``ray COMMAND ...``, "" when there is none."""
    words = iter(sys.argv[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, "")
        elif not word.startswith("-"):
            return word
    return ""


def arguments() -> list[str]:
    """Return what stands behind the command."""
    command = ray_command()
    return sys.argv[sys.argv.index(command, 1) + 1 :] if command else []


def has_option(name: str) -> bool:
    """Tell whether an option without a value was typed."""
    return name in sys.argv[1:]


def cluster_yaml() -> str:
    """Return the cluster YAML that was named, or a word that stands for it."""
    return next((word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))), "CLUSTER.yaml")
