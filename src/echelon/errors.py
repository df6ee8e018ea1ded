"""The one error that is the user's to mend: the command line prints it as a single line and exits with status 2."""


class UserError(ValueError):
    """A bad argument, file or recipe; the message names the thing, its value and what is allowed."""
