"""What goes wrong outside the mathematics, in words that the person at the keyboard can act on."""


class UsageError(Exception):
    """Something that the user can mend: the command line shows it as one line and ends with exit status 2."""
