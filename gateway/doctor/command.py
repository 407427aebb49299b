"""Run all checks, print them, and recommend the next command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from gateway import __version__
from gateway.cli.console import make_console, make_table, say
from gateway.config.settings import Settings, load_settings
from gateway.doctor.finding import Finding, Status, run_checks
from gateway.doctor.hub import hub_checks
from gateway.doctor.machine import machine_checks
from gateway.doctor.models import model_check, registry_check
from gateway.errors import ConfigError

_STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.TODO: "red"}


def examine(models: Path | None) -> list[Finding]:
    """Return the findings of all checks. Nothing is loaded or downloaded, and no check delays or ends the others.

    Args:
        models: the file of models; by default the file that the settings name.
    """
    findings: list[Finding] = []
    try:
        settings = load_settings(os.environ, models=models)
    except ConfigError as error:
        mend = "correct these variables; docs/configuration.md lists them"
        findings.append(Finding("settings", Status.TODO, str(error), mend))
        settings = Settings() if models is None else Settings(models=models)
    registry_look, registries = registry_check(settings.models)
    first = [*machine_checks(settings), *hub_checks(), registry_look]
    findings += run_checks(first)
    has_torch = not any(finding.check == "torch" and finding.status is Status.TODO for finding in findings)
    if registries and has_torch:  # the plans of models import torch
        findings += run_checks([model_check(registries[0])])
    return findings


def next_steps(findings: Sequence[Finding], models: Path | None = None) -> list[str]:
    """Return the next steps in order: the fixes, or, if there is nothing to fix, the commands to run next.

    Args:
        models: the file of models, if the command line names it; then the commands name it too.
    """
    program = _program()
    option = "" if models is None else f" --models {shlex.quote(str(models))}"
    mends = [finding.mend for finding in findings if finding.status is Status.TODO and finding.mend]
    if any(finding.status is Status.TODO for finding in findings):
        return [*dict.fromkeys(mends), f"{program} doctor{option}"]
    verdicts = {
        str(finding.details.get("id")): finding.details.get("verdict")
        for finding in findings
        if finding.check == "model"
    }
    steps = [f"{program} download{option}"] if "after a download" in verdicts.values() else []
    if any(finding.check == "port" and "serves here already" in finding.text for finding in findings):
        return [*steps, f"{program} verify MODEL{option}"]
    return [*steps, f"{program} serve{option}"]


def _program() -> str:
    """Return the command that runs this program in a shell: its path, unless the program is on the PATH."""
    script = Path(sys.executable).with_name("gateway")
    if not script.exists():
        return f"{sys.executable} -m gateway"
    on_path = shutil.which("gateway")
    if on_path is not None and Path(on_path).samefile(script):
        return "gateway"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def diagnose(models: Path | None, *, as_json: bool) -> bool:
    """Run the checks, print the findings, and return whether nothing has to be done."""
    findings = examine(models)
    steps = next_steps(findings, models)
    is_well = all(finding.status is not Status.TODO for finding in findings)
    if as_json:
        report = {
            "version": __version__,
            "status": "ok" if is_well else "todo",
            "findings": [asdict(finding) for finding in findings],
            "next": steps,
        }
        print(json.dumps(report, indent=2))  # noqa: T201  for programs, not for a console
        return is_well
    _print(findings, steps, is_well=is_well)
    return is_well


def _print(findings: Sequence[Finding], steps: Sequence[str], *, is_well: bool) -> None:
    console = make_console()
    table = make_table("check", "status", "found", has_header=False)
    for finding in findings:
        lines = [finding.text, *([f"→ {finding.mend}"] if finding.mend else [])]
        table.add_row(finding.check, Text(finding.status.value, style=_STYLES[finding.status]), "\n".join(lines))
    console.print(table)
    if is_well:
        say(console, "All is well. Next:", "green")
    else:
        number = sum(finding.status is Status.TODO for finding in findings)
        say(console, f"{number} thing{'' if number == 1 else 's'} to do. Next:", "red")
    for step in steps:
        console.print(Text(f"  {step}"), soft_wrap=True)
