"""When does recalibration pay?  The same base, its critic recalibrated or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from tempo_megatron.demo.study.results import AUROC, D_L, D_U, MEAN, Results
from tempo_megatron.demo.study.section import Section, Table, absences, early_ends, number

#: Where the summary splits: AUROC of the critic on D_U, accuracy on D_L.
GOOD_AUROC, SATURATED = 0.8, 0.9

CAPTION = (
    "Each point is one base and one seed. Left: accuracy on D_U at the end with the critic recalibrated and with it "
    "frozen, over the critic's AUROC on D_U at the start (grey: the start). Right: the difference; the colour is the "
    "accuracy on D_L at the start, the shape the base."
)


@dataclass(frozen=True)
class Pair:
    """A base and seed with both of its runs; accuracies are mean@16.

    Attributes:
        auroc: of the critic as RLVR left it, on D_U; None where it has none (every response right, or every one wrong).
        labeled: accuracy on D_L at the start.
        start, recalibrated, frozen: accuracy on D_U at the start and at the two ends.
        noise: half-width of the 95 % sampling interval of the difference of the ends.
    """

    base: str
    seed: int
    auroc: float | None
    labeled: float
    start: float
    recalibrated: float
    frozen: float
    noise: float

    @property
    def difference(self) -> float:
        return self.recalibrated - self.frozen


def pairs_of(results: Results) -> list[Pair]:
    """Every base and seed that has both runs, in the part's order."""
    bases = dict.fromkeys(arm.base.name for arm in results.part.arms)
    found = [(base, seed, _pair(results, base, seed)) for base in bases for seed in results.seeds]
    return [pair for _, _, pair in found if pair is not None]


def _pair(results: Results, base: str, seed: int) -> Pair | None:
    recalibrated, frozen = (results.runs.get((f"{kind}-{base}", seed)) for kind in ("recalibrated", "frozen"))
    if recalibrated is None or frozen is None:
        return None
    start, frozen_end = frozen.accuracy(D_U)
    _, recalibrated_end = recalibrated.accuracy(D_U)
    return Pair(
        base=base,
        seed=seed,
        auroc=frozen.start(f"{D_U}/{AUROC}"),
        labeled=frozen.accuracy(D_L)[0],
        start=start,
        recalibrated=recalibrated_end,
        frozen=frozen_end,
        noise=frozen.noise(D_U, frozen_end, recalibrated_end),
    )


def recalibration_section(results: Results) -> Section:
    """Tables, sentences and figures of the part ``recalibration``."""
    pairs = pairs_of(results)
    return Section(
        results=results,
        title="When does recalibration pay?",
        caption=CAPTION,
        sentences=(*_plainly(pairs), *early_ends(results), *absences(results)),
        tables=(_summary(pairs), _table(pairs)),
        figures={"pairs": pairs, "split": {"auroc": GOOD_AUROC, "labeled": SATURATED}},
    )


@dataclass(frozen=True)
class Cell:
    """Pairs of one kind of critic and one kind of D_L."""

    critic: str
    labeled: str
    pairs: tuple[Pair, ...]

    @property
    def better(self) -> int:
        """Pairs in which recalibration ends higher by more than the sampling noise."""
        return sum(p.difference > p.noise for p in self.pairs)

    @property
    def worse(self) -> int:
        return sum(p.difference < -p.noise for p in self.pairs)


def cells_of(pairs: list[Pair]) -> list[Cell]:
    """The four kinds, without those that have no pair; pairs without an AUROC are in none."""
    cells = []
    for good in (False, True):
        for saturated in (False, True):
            critic = f"AUROC {'at least' if good else 'below'} {GOOD_AUROC}"
            labeled = f"D_L {'at least' if saturated else 'below'} {SATURATED}"
            inside = tuple(
                p
                for p in pairs
                if p.auroc is not None and (p.auroc >= GOOD_AUROC) == good and (p.labeled >= SATURATED) == saturated
            )
            if inside:
                cells.append(Cell(critic, labeled, inside))
    return cells


def _plainly(pairs: list[Pair]) -> list[str]:
    sentences = [
        f"Where the critic starts with {cell.critic} and the policy with {cell.labeled}, recalibration ends "
        f"{number(fmean(p.difference for p in cell.pairs), sign=True)} against the frozen critic on D_U {MEAN} in the "
        f"mean of {len(cell.pairs)}: better in {cell.better}, worse in {cell.worse}, within the evaluation's sampling "
        f"noise in {len(cell.pairs) - cell.better - cell.worse}."
        for cell in cells_of(pairs)
    ]
    unknown = [f"{p.base} (seed {p.seed})" for p in pairs if p.auroc is None]
    if unknown:
        sentences.append(f"Without an AUROC at the start, and in none of these: {', '.join(unknown)}.")
    return sentences


def _summary(pairs: list[Pair]) -> Table:
    rows = [
        (
            cell.critic,
            cell.labeled,
            str(len(cell.pairs)),
            number(fmean(p.frozen for p in cell.pairs)),
            number(fmean(p.recalibrated for p in cell.pairs)),
            number(fmean(p.difference for p in cell.pairs), sign=True),
            str(cell.better),
            str(cell.worse),
        )
        for cell in cells_of(pairs)
    ]
    columns = ("critic at the start", "D_L at the start", "runs", "frozen", "recalibrated", "difference")
    return Table(f"D_U {MEAN} at the end, by kind of base", (*columns, "better", "worse"), tuple(rows))


def _table(pairs: list[Pair]) -> Table:
    rows = [
        (
            p.base,
            str(p.seed),
            number(p.auroc),
            number(p.labeled),
            number(p.start),
            number(p.frozen),
            number(p.recalibrated),
            number(p.difference, sign=True),
        )
        for p in pairs
    ]
    columns = ("base", "seed", "AUROC on D_U", "D_L at the start", "D_U at the start", "frozen", "recalibrated")
    return Table(f"D_U {MEAN} by base and seed", (*columns, "difference"), tuple(rows))
