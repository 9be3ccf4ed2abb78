"""What `make audit` makes of pip-audit's answers."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


def pip_audit(folder: Path, dependencies: object) -> list[str]:
    """A command that answers as pip-audit does; None: its database cannot be reached."""
    program = folder / "pip_audit.py"
    answer = "" if dependencies is None else json.dumps({"dependencies": dependencies})
    program.write_text(
        f"import sys\nanswer = {answer!r}\nassert '==' in open(sys.argv[sys.argv.index('-r') + 1]).read()\n"
        "if answer:\n    open(sys.argv[sys.argv.index('-o') + 1], 'w').write(answer)\nelse:\n    sys.exit(1)\n"
    )
    return [sys.executable, str(program)]


BAD = {
    "name": "ray",
    "version": "2.60.0",
    "vulns": [{"id": "CVE-1", "aliases": ["GHSA-1"], "fix_versions": ["2.61.0"]}],
}
GOOD = {"name": "torch", "version": "2.14.1", "vulns": []}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found on PyPI"}


def test_what_is_found_fails_and_names_the_version_that_helps(audit, tmp_path, capsys):
    assert audit.main(pip_audit(tmp_path, [GOOD, BAD, UNKNOWN])) == 1
    said = capsys.readouterr().out
    assert "ray 2.60.0: CVE-1; fixed in 2.61.0" in said
    assert "2 packages checked, 1 unknown, 1 known problems, 1 not excepted" in said


@pytest.mark.parametrize("name", ["CVE-1", "GHSA-1"])
def test_an_exception_passes_with_its_reason(audit, tmp_path, capsys, monkeypatch, name):
    (tmp_path / "exceptions.toml").write_text(f'[[exception]]\nid = "{name}"\nreason = "Serve is not installed"\n')
    monkeypatch.setattr(audit, "EXCEPTIONS", tmp_path / "exceptions.toml")
    assert audit.main(pip_audit(tmp_path, [BAD])) == 0
    assert "Serve is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [None, [UNKNOWN]])
def test_without_its_database_it_says_so_and_passes(audit, tmp_path, capsys, answer):
    assert audit.main(pip_audit(tmp_path, answer)) == 0
    assert "nothing was checked" in capsys.readouterr().out


def test_without_pip_audit_it_says_so_and_passes(audit, tmp_path, capsys):
    assert audit.main([str(tmp_path / "pip-audit")]) == 0
    assert "nothing was checked" in capsys.readouterr().out


def test_every_exception_has_a_reason(audit):
    assert all(len(reason) > 20 for reason in audit.known_exceptions(audit.EXCEPTIONS).values())
