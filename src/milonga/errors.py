"""The one exception that ends a command with a line rather than a traceback."""

from pydantic import ValidationError


class UserError(ValueError):
    """Something the user gave or the machine refused: says what was wrong, where, and what to do.

    The command line prints the message as one line and exits with code 2.
    """


def describe_validation(error: ValidationError, where: str = "") -> str:
    """All problems of a pydantic error on one line: `path.of.key: what is wrong; ...`, paths below `where`."""
    problems = []
    for entry in error.errors(include_url=False):
        path = ".".join(str(part) for part in ([where] if where else []) + list(entry["loc"]))
        message = entry["msg"].removeprefix("Value error, ")
        if entry["type"] == "extra_forbidden":
            message = "no such setting (misspelt?)"
        elif entry["type"] == "missing":
            message = "is required"
        elif entry["type"] != "value_error" and entry["type"] != "layer":
            message = f"{message}, got {entry['input']!r}"
        separator = "." if entry["type"] == "layer" and ": " in message else ": "
        problems.append(f"{path}{separator}{message}" if path else message)
    return "; ".join(problems)
