"""`make audit`: what is known of vulnerabilities in what requirements.lock names, by pip-audit.

Exit status 0: every package was looked up and has none that is known; 1: some have; 3: some could not be looked up, so
that nothing is known about them.
"""

import json
import subprocess
import sys

from tests.support.lock import LOCK

COMMAND = ["-m", "pip_audit", "--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json"]


def verdict(report: str, complaint: str) -> tuple[int, list[str]]:
    """The exit status and what is said, from pip-audit's report, which is empty where it had no answer."""
    if not report.strip():
        reason = (complaint.strip() or "pip-audit says nothing").splitlines()[-1]
        return 3, [f"not checked: the service that knows vulnerabilities did not answer ({reason})"]
    packages = json.loads(report)["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    vulnerabilities = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    lines = [*vulnerabilities, f"{len(packages) - len(skipped)} of {len(packages)} packages were looked up"]
    if skipped:
        lines.append(f"not checked: {len(skipped)} packages, as {skipped[0]['name']}: {skipped[0]['skip_reason']}")
    return (1 if vulnerabilities else 3 if skipped else 0), lines


if __name__ == "__main__":
    audit = subprocess.run([sys.executable, *COMMAND, "-r", str(LOCK)], capture_output=True, text=True, check=False)
    status, lines = verdict(audit.stdout, audit.stderr)
    print(*lines, sep="\n")
    sys.exit(status)
