"""What `Influence` does when a fit ends: estimate the cost, score, save and log, or record why not."""

import contextlib
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning_influence.attribution.attributor import Attributor
from lightning_influence.callback.offline import cheaper, has_no_ids, offline_lines, slow_gradients
from lightning_influence.callback.plan import ScoringPlan
from lightning_influence.callback.queries import missing_loader, resolve_queries
from lightning_influence.callback.results import Results, scores_file
from lightning_influence.callback.summary import Summary
from lightning_influence.compat import rank_zero_info, rank_zero_warn
from lightning_influence.gradients.transforms import ConstantSelfInfluenceError
from lightning_influence.loggers import listening
from lightning_influence.methods.method import Method
from lightning_influence.methods.plain_loss import LABELS, PlainLoss
from lightning_influence.processes import processes_of
from lightning_influence.progress import telling
from lightning_influence.scores import Scores, SelfScores

_Work = Callable[[str, Method], Scores | SelfScores]
_Answer = TypeVar("_Answer", Scores, SelfScores)
_SHOWN = ("render", "labels", "columns", "normalization")
_WORTH_ANNOUNCING = 5.0  # seconds


def meant(name: str, itself: bool, one: str = "", several: str = "") -> str:
    """A method's scores (several) or its self-influence (one) in words, then that form of a verb; labels by name."""
    what = f"{name}'s self-influence" if itself else f"{name}'s scores"
    return f"{name if name.strip('`') == LABELS else what} {one if itself else several}".rstrip()


def did_not_finish(error: BaseException, run_dir: Path, plan: ScoringPlan, trainer: Any) -> str:
    """Why there are no scores of a fit that an exception ended, and how to score what it recorded."""
    how = f" To score what was recorded until then:\n{offline_lines(run_dir, plan, trainer)}" if plan.names else ""
    told = f": {str(error)[:200]}" if str(error) else ""
    return f"the fit was ended by {type(error).__name__}{told}.{how}"


def score_at_end(
    plan: ScoringPlan,
    trainer: Any,
    run_dir: Path,
    open_attributor: Callable[[], Attributor],
    scores: Results,
    self_scores: Results,
    began: float,
) -> None:
    """Run the methods on what was recorded in `run_dir`, in all processes of the Trainer together; see `EndOfFit`.

    Training had ended when ``time.perf_counter`` was at `began`.
    """
    summary = Summary(run_dir, began)
    summary.spent["recording"] = time.perf_counter() - began
    try:
        with processes_of(trainer).together():  # so that an interrupt between two questions reaches all as well
            with summary.spending("checks"):
                attributor = open_attributor()
            summary.fit_seconds = getattr(attributor.trajectory, "fit_seconds", None) or 0.0
            EndOfFit(plan, trainer, attributor, run_dir, summary, scores, self_scores).run()
    except KeyboardInterrupt:
        lines = offline_lines(run_dir, plan, trainer, *_next_question(plan, scores, self_scores))
        _interrupted(plan, scores, self_scores, lines)
    except Exception as error:
        how = f"To continue:\n{offline_lines(run_dir, plan, trainer)}"
        if has_no_ids(plan, trainer):
            how = "A fit on a stream is scored with `Influence(sample_id=, lookup=)`."
        rank_zero_warn(f"Scores were not computed, the fit is complete: {type(error).__name__}: {error}\n{how}")
        for results in (scores, self_scores):
            results.reasons |= {name: str(error) for name in set(plan.names) - results.keys()}
    finally:
        if plan.verbose and (block := str(summary)):
            rank_zero_info(block)


def _interrupted(plan: ScoringPlan, scores: Results, self_scores: Results, lines: str) -> None:
    """Warn that Ctrl-C ended the scoring, and keep that as the reason of all results that there are not."""
    why = f"Scoring was interrupted; the fit itself is complete. To continue:\n{lines}"
    own = [*(plan.methods if plan.self_influence else ()), *([LABELS] if plan.labels else ())]
    for results, names in (scores, plan.methods if plan.queries is not None else ()), (self_scores, own):
        for name in set(names) - results.keys():
            results.reasons.setdefault(name, why)
    rank_zero_warn(why)


def _next_question(plan: ScoringPlan, scores: Results, self_scores: Results) -> tuple[Method | None, bool]:
    """The first method without an answer, and whether self-influence is what is missing; None: all have theirs."""
    for name, method in plan.methods.items():
        if plan.queries is not None and name not in scores:
            return method, False
        if plan.self_influence and name not in self_scores:
            return method, True
    return None, False


@dataclass(frozen=True)
class EndOfFit:
    """Runs the methods in `on_train_end`. An error in a method becomes a warning and never fails the fit.

    Args:
        plan: what to score.
        trainer: at the end of its fit, with open loggers and the module still on the accelerator.
        attributor: computes scores from this fit.
        run_dir: folder of this fit; scores are saved in `scores/` inside it.
        summary: filled with what was scored; it knows the duration of the fit.
        scores: filled with scores, or with the reason where there are none. A method that already has a reason is not
            scored.
        self_scores: the same for self-influence.
    """

    plan: ScoringPlan
    trainer: Any
    attributor: Attributor
    run_dir: Path
    summary: Summary
    scores: Results
    self_scores: Results

    def run(self) -> None:
        """Rank the labels, then run each method: first scores on the queries, then self-influence."""
        lost = set(self.scores.reasons)
        if self.plan.labels:
            whole = getattr(self.attributor.trajectory, "broken", None) is None
            self._guarded(LABELS, PlainLoss("all" if whole else None), self.self_scores, self._score_itself)
        if self.plan.methods and self.plan.queries is None and not self.plan.self_influence and self.plan.verbose:
            rank_zero_info(
                f"Influence: {', '.join(self.plan.methods)} did not run, since no `queries` were given; the fit is "
                "recorded. Ask: `influence.attributor.score(method, queries)`."
            )
        missing = missing_loader(self.plan.queries, self.trainer)  # which a warning told when the fit started
        for name, method in self.plan.methods.items():
            if missing is not None:
                self.scores.reasons.setdefault(name, missing)
            elif name not in lost and self.plan.queries is not None:
                self._guarded(name, method, self.scores, self._score)
            elif name not in lost:
                self.scores.reasons[name] = "no `queries` were given. Call `influence.attributor.score`."
            if self.plan.self_influence:
                self._guarded(name, method, self.self_scores, self._score_itself)
            else:
                self.self_scores.reasons[name] = (
                    "`self_influence=True` was not given. Call `influence.attributor.self_influence`."
                )

    def _guarded(self, name: str, method: Method, results: Results, work: _Work) -> None:
        try:
            with self.attributor.processes.together():
                results[name] = work(name, method)
        except _TooExpensiveError as refusal:
            self.summary.lacks(meant(name, results is self.self_scores))
            results.reasons[name] = str(refusal)
            what = meant(f"`{name}`", results is self.self_scores, "was", "were")
            rank_zero_warn(f"{what} not started. {refusal}")
        except KeyboardInterrupt as error:
            lines = self._lines(method, results is self.self_scores)
            results.reasons[name] = f"it was interrupted. The fit is complete. To continue:\n{lines}"
            self.summary.lacks(meant(name, results is self.self_scores))
            if kept := self._keep(name, results, error):
                rank_zero_warn(f"`{name}` was interrupted.{kept}")
            raise
        except Exception as error:
            self.summary.lacks(meant(name, results is self.self_scores))
            results.reasons[name] = f"{type(error).__name__}: {error}"
            if isinstance(error, ConstantSelfInfluenceError):  # asked again, it says the same
                rank_zero_warn(f"`{name}` has no self-influence. {error}")
                return
            where = traceback.extract_tb(error.__traceback__)[-1]
            rank_zero_warn(
                f"`{name}` failed with {type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {error}"
                f"{self._keep(name, results, error)}\n"
                f"{self._how_to_continue(method, results is self.self_scores)}"
            )

    def _keep(self, name: str, results: Results, error: BaseException) -> str:
        """Keep and save the scores that were finished before an error, and say where they are."""
        scores: Scores | SelfScores | None = getattr(error, "scores", None)
        if scores is None:
            return ""
        results.partial[name] = scores
        own = isinstance(scores, SelfScores)
        text = f"{'self_' * own}scores.partial[{name!r}]"
        path = self._place(f"{name}{'.self' * own}.partial")
        try:
            scores.save(path, overwrite=True)
        except Exception as failed:
            return f" What was finished is kept as `{text}`, but not saved: {type(failed).__name__}: {failed}"
        return f" What was finished is kept as `{text}`, and saved in {str(path)!r}."

    def _score(self, name: str, method: Method) -> Scores:
        queries = resolve_queries(self.plan.queries, self.trainer)
        score = partial(self.attributor.score, method, queries, top_k=self.plan.top_k)
        scores = self._computed(name, method, partial(self.attributor.cost, method, queries), score)
        self._save(name, scores)
        if self.plan.log_scores:
            self._log(scores, name)
        return scores

    def _score_itself(self, name: str, method: Method) -> SelfScores:
        score = partial(self.attributor.self_influence, method)
        if isinstance(method, PlainLoss):
            score = partial(self.attributor.losses, checkpoints=method.checkpoints)
        scores = self._computed(name, method, partial(self.attributor.cost, method), score, itself=True)
        self._save(f"{name}.self", scores)
        if self.plan.log_scores:
            self._log(scores, name)
        return scores

    def _computed(
        self,
        name: str,
        method: Method,
        estimate: Callable[[], float],
        compute: Callable[[], _Answer],
        itself: bool = False,
    ) -> _Answer:
        """Compute scores if they are worth their estimated time; solvers stop at `max_cost` with what they have found.

        Raises:
            _TooExpensiveError: it would take more than `max_cost` times the duration of the fit.
        """
        spent, session = self.summary.spent, self.attributor._session
        opened = session.opening_seconds
        with self.summary.spending("estimates"):
            estimated = estimate()
        spent["checks"] += session.opening_seconds - opened
        spent["estimates"] -= session.opening_seconds - opened
        estimated = self._afforded(name, method, estimated, itself)
        self.attributor.limit_seconds, before = self.plan.limit(self.summary.fit_seconds), spent["scores"]
        try:
            with self.summary.spending("scores"):
                scores = compute()
        finally:
            self.attributor.limit_seconds = None
        self.summary.add(name, scores, estimated, spent["scores"] - before)
        return scores

    def _save(self, name: str, scores: Scores | SelfScores) -> None:
        if not self.trainer.is_global_zero:
            return
        try:
            with self._doing("album" if self.plan.album else "saving", f"saving {name}"):
                self._write(name, scores)
            self.summary.saved = True
        except OSError as error:
            rank_zero_warn(
                f"`{name}` was scored, but could not be saved ({error}): the scores are in memory only. Save them "
                "elsewhere: `influence.scores[name].save(path)`."
            )

    def _write(self, name: str, scores: Scores | SelfScores) -> None:
        """Save the scores, with what the examples look like if that is wanted and they can be shown."""
        try:
            with self._told_once():
                scores.save(self._place(name), overwrite=True, **self.plan.album)
        except Exception as error:
            if not self.plan.album:
                raise
            scores.save(self._place(name), overwrite=True)
            rank_zero_warn(
                f"`{name}` was saved without what the examples look like: {type(error).__name__}: {error} Pass "
                "`album={'render': function}`, where the function returns a text, an image or a vector for an example."
            )

    def _log(self, scores: Scores | SelfScores, name: str) -> None:
        shown = {key: self.plan.album[key] for key in _SHOWN if key in self.plan.album}
        if not self.trainer.is_global_zero:
            return
        try:
            with self._doing("logging", f"logging {name}"), self._told_once():
                scores.log(self.trainer.loggers, step=self.trainer.global_step, name=name, **shown)
            self.summary.loggers = tuple(type(logger).__name__ for logger in listening(self.trainer.loggers))
        except Exception as error:
            rank_zero_warn(f"`{name}` was scored and saved, but not logged: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def _doing(self, part: str, what: str) -> Iterator[None]:
        """Counts the time of a part, and says what is done if it takes long."""
        with self.summary.spending(part), telling(self.trainer, f"Influence: {what}"):
            yield

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """Warnings that several scores of the fit would repeat, as about the colours of images, are given once."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                new: dict[tuple[type, str], warnings.WarningMessage] = {}
                for one in caught:  # the range of an image's values may be all that differs
                    new.setdefault((one.category, re.sub(r"from -?\d\S* to -?\d\S*", "", str(one.message))), one)
        for key, one in new.items():
            if key not in self.summary.told:
                self.summary.told.add(key)
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def _how_to_continue(self, method: Method, itself: bool) -> str:
        if getattr(self.attributor.trajectory, "broken", None) is not None:
            return "The fit is complete, but its record is not."
        return f"The fit is complete and recorded. To continue:\n{self._lines(method, itself)}"

    def _lines(self, method: Method, itself: bool) -> str:
        return offline_lines(self.run_dir, self.plan, self.trainer, method, itself)

    def _place(self, name: str) -> Path:
        path = scores_file(self.run_dir, name)
        path.parent.mkdir(exist_ok=True)
        return path

    def _afforded(self, name: str, method: Method, seconds: float, itself: bool) -> float:
        """The estimated time, the same in every process, which is announced where somebody would wait for it."""
        seconds = max(self.attributor.processes.gathered(seconds))
        if self.plan.verbose and seconds >= _WORTH_ANNOUNCING:
            rank_zero_info(f"Influence: {meant(name, itself, 'takes', 'take')} about {seconds:.0f} s.")
        fit = self.summary.fit_seconds
        if seconds > self.plan.limit(fit):
            why = slow_gradients(method, self.attributor._session.one_by_one)
            raise _TooExpensiveError(
                f"It would take about {seconds:.1f} s, more than `max_cost={self.plan.max_cost:g}` times the "
                f"fit's {fit:.1f} s.{why} {cheaper(method, itself)}:\n{self._lines(method, itself)}"
            )
        return seconds


class _TooExpensiveError(RuntimeError):
    """The estimated time exceeds `max_cost`."""
