"""Why a fit cannot be tracked."""


class Untrackable(ValueError):
    """The fit cannot be tracked; the message gives the reason and what works instead."""


class PlanError(Untrackable):
    """Tracking would exceed memory, disk or `max_cost`."""
