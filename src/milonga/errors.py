"""The one exception that ends a command with a line rather than a traceback."""


class UserError(ValueError):
    """Something the user gave or the machine refused: says what was wrong, where, and what to do.

    The command line prints the message as one line and exits with code 2.
    """
