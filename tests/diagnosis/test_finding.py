"""The output of a check."""

from __future__ import annotations

from acme_alpn_proxy.diagnosis.finding import Finding, Level, summary, worst


def test_line() -> None:
    """A line has the verdict, the name and, where there are any, cause and remedy."""
    assert str(Finding("port", Level.OK)) == "ok      port"
    assert str(Finding("port", Level.OK, "none runs")) == "ok      port: none runs"
    finding = Finding("port", Level.FAILED, "it is taken", "free it")
    assert str(finding) == "failed  port: it is taken; free it"
    assert finding.as_object() == {
        "name": "port",
        "verdict": "failed",
        "cause": "it is taken",
        "remedy": "free it",
    }


def test_error() -> None:
    """The last part of an error for the operator is its remedy; an error may have none."""
    finding = Finding.refused("start", ValueError("so; or so; do this"), Level.WARNING)
    assert finding == Finding("start", Level.WARNING, "so; or so", "do this")
    assert Finding.refused("start", "just so") == Finding("start", Level.FAILED, "just so")


def test_summary() -> None:
    """The verdict on all together is one sentence."""
    ok, warning, failed = (Finding("a", level) for level in Level)
    assert summary([ok, ok]) == "It would work here: 2 checks, all ok."
    assert summary([ok, warning]) == ("It would work here, but there are warnings: 1 of 2 checks.")
    assert summary([ok, warning, warning, failed]) == (
        "It would not work here: 1 of 4 checks failed, 2 warned."
    )
    assert summary([ok, failed, failed]) == "It would not work here: 2 of 3 checks failed."


def test_worst() -> None:
    """The worst of all levels counts; without any check, all is well."""
    ok, warning = Finding("a", Level.OK), Finding("b", Level.WARNING)
    assert worst([ok, warning, ok]) is Level.WARNING
    assert worst([]) is Level.OK
