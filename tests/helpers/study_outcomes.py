"""Studies run at sizes of seconds, and what they claim."""

from lightning_adam_mini.cli.studies.common.study import load_study


def outcome_of(name, *changes):
    study = load_study(name, changes)
    return study.run(study.settings)


def claims_of(outcome, words):
    """The claims whose text has these words, one at least."""
    found = [claim for claim in outcome.claims if words in claim.text]
    assert found, f"no claim says {words!r}"
    return found
