"""Text to calibrate on: rows of the run's own training split, so that nothing held out is looked at.

A model that was imported, or is opened as it lies, has no data until some is named (`--data FOLDER`).
"""

from itertools import islice

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.recipes.open_run import OpenRun
from dougong.runtime.seeds import derive

TOKENS = 1 << 15
_AT_ONCE = 4096
"""tokens of a batch"""


def calibration(opened: OpenRun, *, tokens: int = TOKENS) -> tuple[list[Batch], tuple[str, ...]]:
    """Rows of the training split in a seeded order, on the run's device, and a note where there are fewer than asked
    for. Raises DataError for data that give no rows of tokens."""
    corpus = opened.corpus
    packing = corpus.facts["splits"]["train"].get("packing")
    if packing is None or corpus.facts.get("kind") == "labelled":
        raise DataError(f"{opened.directory.path} was trained on {corpus.facts.get('kind', 'other data')}, and rows of "
                        "text are needed to calibrate on. Name some: --data FOLDER.")
    wanted = -(-tokens // corpus.context)
    rows = min(wanted, packing["rows"])
    each = min(rows, max(1, _AT_ONCE // corpus.context))
    loader = corpus.loader("train", rows=each, seed=derive(opened.recipe.seed, "calibration"))
    batches = [_rows(batch).to(opened.runtime.device) for batch in islice(loader, rows // each)]
    held = sum(batch["tokens"].numel() for batch in batches)
    notes = () if packing["rows"] >= wanted else (
        f"the training split holds {held:,} tokens to calibrate on, of {tokens:,} wanted: all are used.",)
    return batches, notes


def _rows(batch: Batch) -> Batch:
    """Of judgements, each of the two replies to a prompt is a row of its own."""
    if batch["tokens"].ndim == 2:
        return batch
    return Batch(**{name: batch[name].flatten(0, 1) for name in ("tokens", "targets", "weight")})
