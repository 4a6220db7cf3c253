"""The argument parser of the small commands."""

from __future__ import annotations

import argparse

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Its errors are one line, raised as ``ValueError``, and not printed with the usage."""

    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help)")
