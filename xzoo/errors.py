"""The errors that xzoo raises for a caller's mistakes.

    XzooError(ValueError)     every one of them; the command line prints its one line and exits with 2
        GraphError            no such graph: sizes, degree, share, or neighbours that are not a graph
        ModelError            a model, layer or checkpoint that does not go with what was asked of it
        DataError             images, folders or labels that cannot be used

A message says what was given, what is allowed and what to do, in one line. Mistakes of our own are
assertions, not these.
"""


class XzooError(ValueError):
    """A mistake that the caller can mend; the message says how."""


class GraphError(XzooError):
    """No graph of these sizes exists, or an array is not a graph."""


class ModelError(XzooError):
    """A model, a layer or a checkpoint does not go with what was asked of it."""


class DataError(XzooError):
    """Images, folders or labels cannot be used as they are."""


def first_line(error: BaseException) -> str:
    """The first line of the message of any error; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
