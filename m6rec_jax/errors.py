"""The two ways a command ends early on purpose; `cli` turns them into exit codes."""


class InputError(Exception):
    """The user's input or configuration is wrong (exit 2).

    The message is one line: it names the file or key, the value found and the way out.
    """


class Requeue(Exception):
    """The work was saved after a termination signal and may be started again (exit 75)."""
