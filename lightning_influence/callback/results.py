"""What a fit leaves in `Influence`: scores by method name, and why others are missing."""

from typing import Any


class NoScores(KeyError):
    """There are no scores of this name. Unlike that of other KeyErrors, the message is shown as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


class Results(dict[str, Any]):
    """Scores by method name. A missing key raises with the names that exist and why the method did not run.

    ``partial`` has, by method name, the scores that were finished when an error ended a method.
    """

    def __init__(self) -> None:
        super().__init__()
        self.partial: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.why: str | None = None  # there are no scores at all, as the fit was not recorded

    def __missing__(self, key: str) -> Any:
        names = ", ".join(map(repr, self)) or "none yet"
        reason = self.reasons.get(key, self.why)
        why = "" if reason is None else f" {key!r} did not run: {reason}"
        why += f" What was finished is in `.partial[{key!r}]`." if key in self.partial else ""
        raise NoScores(f"Expected the name of existing scores ({names}), got {key!r}.{why}")

    def clear(self) -> None:
        """Remove scores and reasons."""
        super().clear()
        self.partial.clear()
        self.reasons.clear()
        self.why = None
