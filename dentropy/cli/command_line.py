"""A parser that says what is wrong with a command line in one line, and what was probably meant."""

from __future__ import annotations

import argparse
import difflib


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a bad command line; the usage is in --help."""

    _words: tuple[str, ...] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._words = tuple(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, by the command's own parser, which knows its options
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str):
        raise ValueError(f"{message}{self._meant()} (see {self.prog} --help)")

    def _meant(self) -> str:
        """For each mistyped option, or for the command where that is what this parser reads, the nearest there is."""
        commands = [name for action in self._actions if not action.option_strings for name in action.choices or ()]
        if commands:
            return _nearest([word for word in self._words[:1] if word not in commands], [*commands, *self._options()])
        options = self._options()
        # An abbreviation is no mistake, and what begins with a space is a negative number.
        typed = [word.partition("=")[0] for word in self._words if word.startswith("-")]
        return _nearest([word for word in typed if not any(name.startswith(word) for name in options)], options)

    def _options(self) -> list[str]:
        return list(self._option_string_actions)


def _nearest(words: list[str], known: list[str]) -> str:
    found = {word: difflib.get_close_matches(word, known, n=1) for word in words}
    return "".join(f"; did you mean {match[0]} for {word}?" for word, match in found.items() if match)
