import logging

import pytest

from llmtrain.engine.display import show_log


def test_the_main_process_shows_what_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("llmtrain")
    before, level = list(log.handlers), log.level
    try:
        show_log(is_main=True)
        show_log(is_main=True)  # stages of a pipeline follow one another
        logging.getLogger("llmtrain.data.rows").info("read as pairs")
        show_log(is_main=False)
        logging.getLogger("llmtrain.data.rows").info("read as pairs, by another process")
        logging.getLogger("llmtrain.data.rows").warning("two rows left out")
    finally:
        log.handlers[:] = before
        log.setLevel(level)
    assert capsys.readouterr().err == "read as pairs\ntwo rows left out\n"
