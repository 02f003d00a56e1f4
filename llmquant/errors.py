"""The exception for every error that a user can cause and correct.

Its message is one line with four parts: the name, the value, the rule that it breaks, and the remedy. The command line
prints the message and exits with code 2; the Python API raises the exception. A mistake that only this library can make
is an `assert` or a plain exception.
"""


class UserError(Exception):
    """An error that the user can correct. Its message is one line with the name, the value, the rule and the remedy."""


def one_line(error: BaseException, length: int = 150) -> str:
    """Return the message of an exception on one line of at most about `length` characters, for use in a UserError.

    The result is the name of the exception's class if the exception has no message.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= length else words[:length].rsplit(" ", 1)[0] + " …"
