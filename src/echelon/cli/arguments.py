"""argparse, complaining in one line."""

import argparse
from typing import Any

from echelon.errors import UserError
from echelon.registry import suggest


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one :class:`UserError`, with the nearest option named."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized arguments: "):
            first = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"unknown argument {first!r}{suggest(first.split('=')[0], self._option_string_actions)}"
        raise UserError(message)
