# SPDX-License-Identifier: Apache-2.0
"""What a check found, as data: severity, code, place, remedy, and the exit status that follows."""

import enum
from dataclasses import dataclass, field

from fvdengine.errors import EngineError

REPAIR = "fvdctl check --repair"
FROM_COPY = "Restore the image from a copy."
SHOWN_MAX = 10  # of one kind: a damaged table may have millions


class Severity(enum.Enum):
    """How bad a finding is."""

    NOTE = "note"
    UNCHECKED = "unchecked"  # could not be looked at, or depends on a file that is not in order
    CORRUPT = "corrupt"
    LEAK = "leak"  # space is taken that nothing uses


EXIT_STATUS = {Severity.CORRUPT: 2, Severity.UNCHECKED: 1, Severity.LEAK: 3, Severity.NOTE: 0}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: in which part of the image, and what helps."""

    severity: Severity
    code: str
    message: str
    where: str = ""
    remedy: str = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "severity": self.severity.value, "code": self.code, "message": self.message,
            "where": self.where, "remedy": self.remedy,
        }  # fmt: skip


@dataclass(slots=True)
class JournalCounts:
    """Sectors of the journal by what they are, and how far its numbers go."""

    live: int = 0
    stale: int = 0
    torn: int = 0
    ignored: int = 0
    highest_epoch: int = 0
    highest_sequence: int = 0

    def as_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in JournalCounts.__dataclass_fields__}


@dataclass(slots=True)
class CheckResult:
    """All findings and some counts of what was looked at.

    zero_blocks: blocks that are local and lie in a chunk without a place, so they read as zeros.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)
    blocks: int = 0
    local_blocks: int = 0
    zero_blocks: int = 0
    chunks: int = 0
    mapped_chunks: int = 0
    replayed_blocks: int = 0
    replayed_chunks: int = 0
    journal: JournalCounts = field(default_factory=JournalCounts)

    @property
    def exit_status(self) -> int:
        """2 corrupt, else 1 not all could be checked, else 3 leaks, else 0."""
        for severity, status in EXIT_STATUS.items():
            if any(finding.severity is severity for finding in self.findings):
                return status
        return 0

    def add(
        self, severity: Severity, code: str, message: str, *, where: str, remedy: str = ""
    ) -> None:
        self.findings.append(Finding(severity, code, message, where, remedy))

    def add_error(
        self, error: EngineError, *, where: str, is_corrupt: bool | None = None, remedy: str = ""
    ) -> None:
        """Enter what stopped a part of the check."""
        corrupt = error.is_corruption if is_corrupt is None else is_corrupt
        severity = Severity.CORRUPT if corrupt else Severity.UNCHECKED
        self.add(severity, error.code, error.message, where=where, remedy=remedy or error.hint)

    def as_dict(self) -> dict[str, object]:
        return {
            "path": self.path,
            "exit_status": self.exit_status,
            "findings": [finding.as_dict() for finding in self.findings],
            "blocks": self.blocks,
            "local_blocks": self.local_blocks,
            "zero_blocks": self.zero_blocks,
            "chunks": self.chunks,
            "mapped_chunks": self.mapped_chunks,
            "replayed_blocks": self.replayed_blocks,
            "replayed_chunks": self.replayed_chunks,
            "journal": self.journal.as_dict(),
        }
