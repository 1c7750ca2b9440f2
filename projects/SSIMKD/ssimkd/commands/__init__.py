"""The commands of `ssimkd`. Each is a file with a function `main`."""

import argparse


def command_parser(name: str, text: str) -> argparse.ArgumentParser:
    """The parser of a command that takes a config; `text` is shown by --help."""
    parser = argparse.ArgumentParser(
        f"ssimkd {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        "--config",
        required=True,
        metavar="FILE",
        help="path of a .yaml or .py config, or the name of one of this project's configs",
    )
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the overrides of the config, which come last on a command line."""
    text = "overrides of the config: KEY VALUE (.yaml) or key=value (.py)"
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=text)


def at_least(least: int):
    """The type of an argument that is a whole number and at least `least`."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    parse.__name__ = "whole number"  # argparse names it when int() fails
    return parse
