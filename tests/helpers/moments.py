"""The command line, with a signal to itself at a chosen call of a function: a moment that no clock decides.

python tests/helpers/moments.py SIGKILL 3 after grcsf_fast.inference.prediction:save_on_grid predict -i scans -o results

Under torchrun the signal is the last process's alone.
"""

import functools
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable


def arm(number: int, count: int, when: str, place: str, first: Callable[[], object] = lambda: None) -> None:
    """Send signal ``number`` before or after the ``count``-th call, in whichever thread, of ``MODULE:NAME[.NAME]``.

    What is to be called ``first`` is called just before it is sent.
    """
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    function = getattr(owner, name)
    calls = itertools.count(1)

    def send():
        first()
        os.kill(os.getpid(), number)

    @functools.wraps(function)
    def counted(*arguments, **named):
        reached = next(calls) == count
        if reached and when == "before":
            send()
        result = function(*arguments, **named)
        if reached and when == "after":
            send()
        return result

    setattr(owner, name, counted)


def main() -> int:
    from grcsf_fast.cli import main as command_line

    name, count, when, place, *arguments = sys.argv[1:]
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        arm(signal.Signals[name], int(count), when, place)
    return command_line(arguments)


if __name__ == "__main__":
    sys.exit(main())
