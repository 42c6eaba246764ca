"""`Influence`, the callback: records a fit, drives trackers, runs methods when the fit ends."""
