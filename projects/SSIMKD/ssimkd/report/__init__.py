"""One page about a finished run: `tools/report.py`."""
