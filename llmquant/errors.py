"""The one error a user can cause.

Its message is one line: the name, the value, the rule it breaks, and what to do next. The command line prints it and
exits with code 2; from Python it is raised as it is. Whatever only we can break is an `assert` or a plain exception.
"""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, why, and the remedy."""
