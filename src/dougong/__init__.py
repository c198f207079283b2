"""dougong (斗拱): build your own large model, from a folder of files on a laptop to a cluster."""

__version__ = "0.1.0"
