"""Tables and plots of a run, made of the files in its folder: Markdown, one self-contained HTML page, and JSON."""

from nanochat_pl.report.write import SUMMARY_COLUMNS, summary_table, write_report

__all__ = ["SUMMARY_COLUMNS", "summary_table", "write_report"]
