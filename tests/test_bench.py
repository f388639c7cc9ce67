"""The report of the bench about its measurements."""

from __future__ import annotations

from bench.attacks import Visits, table
from bench.contenders import HAPROXY, OURS
from bench.report import Run, figures, targets

MEASURED = {OURS: [120.0, 320.0, 120.0, 160.0], HAPROXY: [100.0, 200.0, 100.0, 100.0]}


def run_of(*contenders: str) -> Run:
    """A run in which these took part in one measure."""
    tcp = {each: {"cpu_us": MEASURED[each]} for each in contenders}
    return {"contenders": list(contenders), "measures": {"tcp": tcp}}


def test_ratio_within_each_round() -> None:
    """A round in which all were slow counts like any other."""
    (line,) = (line for line in targets(run_of(OURS, HAPROXY)).splitlines() if "TCP" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "1.40",
        "1.5",
        "met",
        "1.20 to 1.60",
    ]


def test_not_met() -> None:
    """A figure over its limit is marked."""
    run = run_of(OURS, HAPROXY)
    run["measures"]["tcp"][HAPROXY] = {"cpu_us": [80.0] * 4}
    assert "**not met**" in targets(run)


def test_alone() -> None:
    """A single contender has figures, and no ratio."""
    for contender, shown in ((OURS, "140"), (HAPROXY, "100")):
        run = run_of(contender)
        assert shown in figures(run)
        assert targets(run) == ""


def test_attacks() -> None:
    """For each attack there is a line: how long visitors wait with and without it, and how many
    failed."""
    calm, attacked = Visits([1.0] * 98 + [10.0] * 2, 0), Visits([2.0] * 98 + [25.0] * 2, 3)
    found = {"tiny_records": {"calm": calm, "attacked": attacked, "direct": calm}}
    assert [cell.strip() for cell in table(found).splitlines()[-1].split("|")[1:-1]] == [
        *["tiny records", "2.0", "25.0", "10.0", "2.5", "3 of 100", "-", "10.0"]
    ]
