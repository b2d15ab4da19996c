"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, a data file, a checkpoint or the command line.

    The message is one line: where (file, line, key), what is wrong, what would be right. Commands
    print it without a traceback and exit with code 1.
    """
