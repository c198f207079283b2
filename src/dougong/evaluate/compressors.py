"""What `xz -9` makes of the same documents: the compressor everyone has, as a second honest baseline."""

import lzma
from collections.abc import Iterable

import numpy as np

from dougong.evaluate.scores import NATS_PER_BIT, DocumentScores

_LARGEST_DICTIONARY = 64 << 20   # that of preset 9
_SMALLEST_DICTIONARY = 4096      # the least that xz accepts


def xz_bytes(data: bytes) -> int:
    """Length of the .xz file that `xz -9e` makes, its container included: header, CRC64 and index, so that
    one byte makes a file of 60.

    The dictionary is no larger than the data: it could not be used, and clearing 64 MiB for each small
    document takes far longer than compressing it.
    """
    dictionary = min(max(len(data), _SMALLEST_DICTIONARY), _LARGEST_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters))


def xz_per_document(documents: Iterable) -> DocumentScores:
    """Every document (`id`, `source`, `text`) compressed alone."""
    documents = list(documents)
    texts = [document.text.encode("utf-8") for document in documents]
    return DocumentScores(name="xz -9 per document", ids=[d.id for d in documents],
                          sources=[d.source for d in documents],
                          nats=np.array([8 * xz_bytes(text) * NATS_PER_BIT for text in texts]),
                          bytes=np.array([len(text) for text in texts]))


def xz_concatenated(documents: Iterable) -> float:
    """Bits per byte of all documents in one archive, which may copy from one document into the next.

    A note, not a baseline: it adapts to the very documents it is tested on, and has no per-document figures.
    """
    data = b"".join(document.text.encode("utf-8") for document in documents)
    return 8 * xz_bytes(data) / len(data)
