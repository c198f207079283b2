"""Python's garbage collector, on all processes at once: one that stops to collect makes all others wait."""

import gc


class Garbage:
    """Collects every `every` steps instead of whenever Python wants; with None Python keeps its way."""

    def __init__(self, every: int | None) -> None:
        self.every, self._was_on = every, False

    def __enter__(self) -> "Garbage":
        if self.every:
            self._was_on = gc.isenabled()
            gc.collect()
            gc.freeze()     # what is there now stays to the end: it need not be looked through again
            gc.disable()
        return self

    def collect(self, step: int) -> None:
        if self.every and step % self.every == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self.every:
            gc.unfreeze()
            if self._was_on:
                gc.enable()
