"""More of a sweep that has run: further configurations, further replicates of every arm, or further runs.

What has an outcome stays as it is. Seeds go on where they were, so that new replicates are paired as the old ones are;
the searcher is told all that ran before, and goes on counting. So the same sweep extended is the sweep that would have
been that large from the beginning, wherever what is proposed does not hang on the number that was asked for or on what
ran at the same time: always for `random`, `grid` and `qmc`; for `gp` and `tpe` where trials ran one after another and
every arm has its replicates when the next is proposed; not by `--runs`, which spends its runs by how many there are.

Each extension stands in `study.json` beside the new size, in one file, so that neither is ever there without the other:
when, what, by which version, after how many trials, and who was ahead. Whoever looks and then asks for more chooses
when to stop, and intervals over all runs do not know that: the report says so. A confirmation has looks for that.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from search.arms import Arm, candidate_of, planned
from search.replicates import FRESH
from search.store import (
    MOST,
    STUDY_FILE,
    Extension,
    StudyConfig,
    confirmation_name,
    only_driver,
    refuse_second_driver,
    refuse_stale,
    save_study_config,
)
from spaces.config import ConfigError
from spaces.errors import NoCandidate
from trainable.versions import versions


def extended(
    study: StudyConfig, arms: Sequence[Arm], *, trials: int | None, replicates: int | None, runs: int | None
) -> StudyConfig:
    """Larger by so many configurations, replicates of every arm, or runs, with the extension noted. Writes nothing.

    Raises ConfigError for what this sweep cannot have more of.
    """
    _refuse(study, trials=trials, replicates=replicates, runs=runs)
    size: dict[str, int]
    if study.total is not None:
        assert runs is not None
        size = {"trials": study.total + runs, "total": study.total + runs}
    else:
        size = {"trials": study.trials + (trials or 0), "replicates": study.replicates + (replicates or 0)}
    larger = study.model_copy(update=size)
    new = Extension(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=_program(),
        ended=sum(len(arm.results) for arm in arms),
        candidate=_ahead(study, arms),
        trials=(study.trials, larger.trials),
        replicates=(study.replicates, larger.replicates),
        total=None if study.total is None or larger.total is None else (study.total, larger.total),
    )
    return larger.model_copy(update={"extensions": (*study.extensions, new)})


def _refuse(study: StudyConfig, *, trials: int | None, replicates: int | None, runs: int | None) -> None:
    name = study.name
    if study.kind == "confirm":
        looks = ",".join(map(str, study.looks))
        raise ConfigError(
            f"NAME={name}: is a confirmation, whose looks were planned; one that may have more of them takes: "
            f"{study.go_on} --looks {looks},..."
        )
    if study.kind == "program":
        raise ConfigError(
            f"NAME={name}: is a programme, which says itself how much runs; change its file, then: "
            f"rin program run FILE --name {name}"
        )
    by_numbers = {"--trials": trials, "--replicates": replicates}
    if study.total is not None:
        for option, value in by_numbers.items():
            if value is not None:
                raise ConfigError(
                    f"{option} {value}: {name} was given {study.total} runs, and decides itself what they are; "
                    "give --runs"
                )
        if runs is None:
            raise ConfigError(f"--runs: say how many more than its {study.total} runs {name} gets")
        return
    if runs is not None:
        raise ConfigError(
            f"--runs {runs}: {name} has {study.trials} configurations x {study.replicates} replicates; "
            "give --trials or --replicates"
        )
    if trials is None and replicates is None:
        raise ConfigError(
            f"--trials, --replicates: say how many more configurations than {study.trials}, or replicates of each "
            f"than {study.replicates}, {name} gets"
        )
    if trials is not None and study.kind == "ablation":
        raise ConfigError(
            f"--trials {trials}: {name} is an ablation, whose arms come from {study.parent}; give --replicates"
        )
    if replicates is not None and study.replicates + replicates > FRESH:
        raise ConfigError(
            f"--replicates {replicates}: {name} has {study.replicates}, and seeds for {FRESH} of an arm before "
            "those of a confirmation begin; give fewer"
        )


def refuse_while_it_runs(study: StudyConfig) -> None:
    """Raises ConfigError while another process runs the sweep, or confirms its candidate."""
    refuse_second_driver(study)
    second = study.model_copy(update={"name": confirmation_name(study.name), "kind": "confirm", "parent": study.name})
    if STUDY_FILE in second.folder.names():
        refuse_second_driver(second)


def refuse_what_is_not_there(study: StudyConfig, larger: StudyConfig, arms: Sequence[Arm]) -> None:
    """Raises ConfigError for more than the space holds, and for a budget that is spent."""
    from search.budget import Budget  # Ray: what is wrong with the options is told before it is imported
    from search.searchers import RinSearch

    name, used = study.name, Budget(larger, arms)
    if used.spent:
        raise ConfigError(
            f"--budget {used.limit_hours:g}: {name} has used {used.earlier_hours:.4g} hours, so nothing would run; "
            "give more: --budget HOURS"
        )
    more = larger.trials - study.trials
    to_come = study.trials - len(arms) if study.total is None else 0
    room = RinSearch(larger, arms).further(to_come + more)
    if room is None or not more:
        return
    if study.total is None and room < to_come + more:
        left = max(room - to_come, 0)
        remedy = f"give --trials {left}" if left else "give --replicates, or a larger space: rin sweep SPACE --from"
        raise ConfigError(
            f"--trials {more}: space {study.space.name} has {left or 'no'} further configuration{'s'[: left != 1]}; "
            f"{remedy}{'' if left else f' {name}'}"
        )
    if study.total is not None:
        again = sum(max(MOST - len(planned(study, arm)), 0) for arm in arms)
        undecided = study.total - sum(len(planned(study, arm)) for arm in arms)
        if (left := max(again + MOST * room - undecided, 0)) < more:
            raise ConfigError(
                f"--runs {more}: its configurations and the {room} that space {study.space.name} still has can take "
                f"{left} more, of {MOST} replicates each; give fewer, or a larger space: rin sweep SPACE --from {name}"
            )


def write_extension(larger: StudyConfig) -> None:
    """For whoever runs it later, by `rin resume`. Raises ConfigError where another process is at it."""
    with only_driver(larger):
        refuse_stale(larger)
        save_study_config(larger)


def _program() -> str:
    known = versions(("rin-search",))
    return " ".join(known[name] for name in ("rin-search", "commit") if name in known)


def _ahead(study: StudyConfig, arms: Sequence[Arm]) -> str:
    try:
        return candidate_of(study, arms).arm.name
    except NoCandidate:
        return ""
