"""The one error a user can cause.

Its message is one line: the name, the value, the rule it breaks, and what to do next. The command line prints it and
exits with code 2; from Python it is raised as it is. Whatever only we can break is an `assert` or a plain exception.
"""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, why, and the remedy."""


def first_words(error: BaseException, length: int = 150) -> str:
    """An error of another library as part of one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= length else words[:length].rsplit(" ", 1)[0] + " …"
