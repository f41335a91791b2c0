"""What a command's exit status says."""

from locally.evidence import Evidence, Outcome, Status

EXIT_NOT_HELD, EXIT_USAGE, EXIT_CRASHED, EXIT_INTERRUPTED = 1, 2, 3, 130


def exit_status(evidence: Evidence) -> int:
    if evidence.status is Status.REFUSED:
        return EXIT_USAGE
    if evidence.status is not Status.FINISHED:
        return EXIT_CRASHED
    return 0 if evidence.verdict.outcome is Outcome.HOLDS else EXIT_NOT_HELD
