"""The teacher: a frozen detector that gives its maps. Start with `frozen.py`."""
