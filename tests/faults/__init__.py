"""Breaks rlopt on purpose and counts what comes of it: ``python -m tests.faults`` (see ``__main__.py``)."""
