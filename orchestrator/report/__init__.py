"""The pages people look at: report.html for a study, tables and progress for a terminal."""

from __future__ import annotations

from orchestrator.report.page import write_report

__all__ = ["write_report"]
