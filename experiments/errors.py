"""The one exception for what a user can mend: printed as a sentence, exit code 1."""


class UserError(Exception):
    """A mistake or a lack on the user's side; the message says how to mend it."""
