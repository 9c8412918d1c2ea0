"""The papers' order of systems and ours, column by column of the published tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from math import factorial
from typing import NamedTuple

from ..records import paired, score
from . import published
from .ranking import Agreement, Comparison, agreement, holm, p_value
from .standings import BASE, Standings
from .tables import Table


class Order(NamedTuple):
    """Of a published column, held against our runs."""

    place: tuple[str, ...]  # source, table, dataset, network, labels
    printed: dict[str, float]  # highest first
    agreement: Agreement  # of printed numbers with our means
    single: list[float]  # Kendall's tau with each draw alone
    duels: Counter  # verdicts on "this is better than that" over all printed pairs


def of(stand: Standings) -> list[Order]:
    """Every published column that holds three of the systems that have run with all draws."""
    found = []
    for place, printed in published.columns(published.load()).items():
        theirs = {n: float(cell.value) for n, cell in printed.items() if n in stand.full}
        if len(theirs) < 3 or len(set(theirs.values())) < 2:
            continue
        theirs = dict(sorted(theirs.items(), key=lambda item: -item[1]))
        above = [(a, b) for a, b in combinations(theirs, 2) if theirs[a] > theirs[b]]
        pairs = [[stand.results[n].values() for n in pair] for pair in above]
        differences = [paired(*pair) for pair in pairs]
        p = holm([p_value(difference) for difference in differences])
        duels = Counter(Comparison(*each).verdict for each in zip(differences, p, strict=True))
        draws = range(len(stand.results[BASE]))
        single = [agreement(theirs, {n: stand.full[n][i] for n in theirs}).tau for i in draws]
        found.append(Order(place, theirs, agreement(theirs, stand.mean), single, duels))
    return found


def table(orders: Sequence[Order], caption: str = "") -> Table:
    rows = []
    for o in orders:
        a, where = o.agreement, f"{o.place[0]}, {o.place[1]}, {o.place[-1]} labels"
        row = [where, a.n, _chain(o.printed), f"{a.tau:+.2f} ({a.tau_p:.2f})"]
        row += [f"[{min(o.single):+.2f}, {max(o.single):+.2f}]", f"{a.rho:+.2f} ({a.rho_p:.2f})"]
        rows.append([*row, *(o.duels[w] for w in ("better", "worse", "not distinguishable"))])
    header = ["published", "n", "its order", "tau (p)", "in single draws", "rho (p)"]
    words = "Printed pairs: yes, our runs confirm them, no, they contradict, open, neither."
    return Table([*header, "yes", "no", "open"], rows, f"{caption} {words}".strip())


def told(orders: Sequence[Order]) -> str:
    """What all columns say together, in Markdown."""
    if not orders:
        return "No published column holds three systems that have run here with all draws."
    pairs, sizes = sum((o.duels for o in orders), Counter()), sorted(o.agreement.n for o in orders)
    least = [2 / factorial(n) for n in (sizes[0], sizes[-1])]
    return (
        f"{len(orders)} columns of {len({o.place[:2] for o in orders})} tables. Of {pairs.total()} "
        f"printed pairs our runs **confirm {pairs['better']}, contradict {pairs['worse']}** and "
        f"leave {pairs['not distinguishable']} open. The smallest p that any order can reach is "
        f"{least[0]:.2g} with {sizes[0]} systems, the fewest here, and {least[1]:.2g} with "
        f"{sizes[-1]}, the most."
    )


def beside(stand: Standings, place: tuple[str, ...]) -> Table:
    """A published column with ours beside it; differences to supervised-only, or else to the
    first that has run here."""
    source, number, dataset, network, labels = place
    cells = published.load(source=source, table=number, dataset=dataset)
    cells = [c for c in cells if (c.network, c.labels) == (network, labels)]
    known = {n: c.method for n, c in published.columns(cells)[place].items() if n in stand.full}
    ours = {m: {d: score(r) for d, r in stand.results[n].items()} for n, m in known.items()}
    base = known.get(BASE) or next(iter(ours))
    return published.beside(cells, ours, base, f"{source}, table {number}, {labels} labels.")


def _chain(values: Mapping[str, float]) -> str:
    """{"a": 2, "b": 1, "c": 1}, falling, as "a > b = c"."""
    names = list(values)
    signs = [" > " if values[a] > values[b] else " = " for a, b in pairwise(names)]
    return names[0] + "".join(sign + name for sign, name in zip(signs, names[1:], strict=True))
