"""The errors that xzoo raises for a caller's mistakes.

    XzooError(ValueError)    all of them; the command line prints the one line and exits with 2
        ModelError           a model, layer or checkpoint does not go with what was asked of it
            GraphError       no such graph: sizes, degree, share, seed, or no graph at all
            InputError       an input has a size that a layer does not take; also a RuntimeError
        DataError            images, folders or labels that cannot be used

A message says what was given, what is allowed and what to do, in one line. Mistakes of our own are
assertions, not these.
"""


class XzooError(ValueError):
    """A mistake that the caller can mend; the message says how."""


class ModelError(XzooError):
    """A model, a layer or a checkpoint does not go with what was asked of it."""


class GraphError(ModelError):
    """No graph of these sizes exists, or an array is not a graph."""


class InputError(ModelError, RuntimeError):
    """An input has a size that the layer does not take; a RuntimeError too, as in torch."""


class DataError(XzooError):
    """Images, folders or labels cannot be used as they are."""


def first_line(error: BaseException) -> str:
    """The first line of the message of any error; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
