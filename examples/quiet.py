"""Keeps the messages of imported libraries out of what a demo or benchmark prints."""

import logging


def silence_libraries() -> None:
    """Drops remarks on import and the progress bars of loading and saving; warnings about training stay."""
    for chatty in ("torchao", "torch.utils._pytree"):  # about extensions that nothing here uses
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
