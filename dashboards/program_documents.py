"""`rin program report`: a programme's documents, written beside it and told to MLflow."""

from collections.abc import Mapping, Sequence

from dashboards.program_text import documents
from search.arms import Arm
from search.layer_scan import layer_changes
from search.program import Walk
from search.program_report import ProgramReport, report_program
from search.store import StudyConfig
from search.tracking import tell_documents
from spaces.programme import Programme

FOLDER = "documents"


def read_report(
    study: StudyConfig, programme: Programme, registered: str, walks: Mapping[str, Walk], arms: Sequence[Arm]
) -> ProgramReport:
    """As far as the programme is, with the scans of its arms. Raises ConfigError for files that are damaged."""
    return report_program(study, programme, registered, walks, layer_changes(study, arms))


def write_documents(report: ProgramReport) -> dict[str, str]:
    """STORE/NAME/documents/*.md; name -> Markdown. Raises ConfigError where MLflow does not take them: the files are
    written then."""
    files = documents(report)
    for name, text in files.items():
        (report.study.folder / FOLDER).write(name, text)
    tell_documents(report.study, files)
    return files
