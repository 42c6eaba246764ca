"""How many steps each of several optimizers made, which Lightning's ``global_step`` adds up."""

from collections.abc import Mapping, Sequence
from typing import Any


def count_optimizers(contents: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is added to the optimizer options, and notes.

    Args:
        contents: of Lightning's ``.ckpt`` files.

    Returns:
        ``optimizers``: by how many ``global_step`` is divided; ``uncounted``: whether that is a guess.
    """
    count = max((len(content.get("optimizer_states") or ()) for content in contents), default=0)
    if count < 2:
        return {}, []
    for content in contents:
        progress = ((content.get("loops") or {}).get("fit_loop") or {}).get("epoch_loop.batch_progress") or {}
        if content["global_step"] != count * (progress.get("total") or {}).get("ready", -1):
            note = (
                f"The files have the steps of {count} optimizers together, not of each: each is taken to have made as "
                "many, so that the scores' units are arbitrary."
            )
            return {"optimizers": count, "uncounted": True}, [note]
    return {"optimizers": count}, [f"Each of the {count} optimizers made one step in each batch."]
