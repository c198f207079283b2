"""From files to batches: sources, cleaning, splits, tokenizers, shards, packing, loading."""

from dougong.core.table import Table
from dougong.data.batch import Batch

DATA = Table("data", {
    "text": "dougong.data.prepare:TextData",
    "chats": "dougong.data.chats:ChatData",
    "preferences": "dougong.data.preferences:PreferenceData",
    "labelled": "dougong.data.labelled:LabelledData",
    "digits": "dougong.data.arrays:DigitsData",
    "regression": "dougong.data.arrays:RegressionData",
})
SOURCES = Table("source", {
    "files": "dougong.data.sources:FilesSource",
    "jsonl": "dougong.data.sources:JsonlSource",
    "parquet": "dougong.data.sources:ParquetSource",
    "hf": "dougong.data.sources:HuggingFaceSource",
    "python": "dougong.data.sources:PythonSource",
})
TOKENIZERS = Table("tokenizer", {
    "bpe": "dougong.data.tokenizer:BpeConfig",
    "characters": "dougong.data.tokenizer:CharactersConfig",
    "bytes": "dougong.data.tokenizer:BytesConfig",
    "file": "dougong.data.tokenizer:FileConfig",
})

__all__ = ["DATA", "SOURCES", "TOKENIZERS", "Batch"]
