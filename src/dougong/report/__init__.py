"""A run → one self-contained HTML page, in English and Chinese, that needs no network and no us."""

from dougong.report.page import write_report

__all__ = ["write_report"]
