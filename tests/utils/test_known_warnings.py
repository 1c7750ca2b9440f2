"""Warnings of other packages: each of Detectron2's on data is shown once."""

import io
import logging

from ssimkd.utils.known_warnings import FirstTime


def test_a_warning_passes_once_and_other_records_always():
    shown, logger = io.StringIO(), logging.Logger("data")
    logger.addHandler(logging.StreamHandler(shown))
    logger.addFilter(FirstTime())
    for _ in range(2):
        logger.warning("ids of %s do not start at 1", "a.json")
        logger.info("Loaded %s", "a.json")
    logger.warning("ids of %s do not start at 1", "b.json")
    assert shown.getvalue().split("\n") == [
        "ids of a.json do not start at 1", "Loaded a.json", "Loaded a.json",
        "ids of b.json do not start at 1", "",
    ]  # fmt: skip
