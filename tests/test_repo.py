"""Guards of the repository itself: the linked folders, which way imports point, what must not be in a file."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "parallel", "configs")

# Whoever finds one of these in a file is looking at one machine's paths or at the package index it used. The brackets
# keep the patterns from matching themselves.
LEAKS = re.compile(
    r"(?<![A-Za-z])/(?:wor[k]|far[m])/|/tmp/bash_job[s]|/opt/(?:whee[l]s|pyp[i])"
    r"|pypi\.or[g]|pythonhosted\.or[g]|download\.pytorch\.or[g]|index[-_]ur[l]\s*="
)


def git(*arguments: str) -> list[str]:
    """Lines that git prints; skips the test where there is no checkout (an unpacked archive)."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def python(code: str) -> str:
    """What a fresh interpreter, started at the root, prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file under kernels/ or parallel/ imports, inside functions too."""
    package = ".".join(("mm_sglang", *path.relative_to(ROOT).parent.parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_three_folders_are_links() -> None:
    for name in LINKED:
        link = ROOT / "mm_sglang" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}", link
        assert link.is_dir(), link
        # With one, `import kernels` from the root would find ours; without, any installed `kernels` wins (PEP 420).
        assert not (ROOT / name / "__init__.py").exists(), name


def test_git_stores_the_links_as_links() -> None:
    for line in git("ls-files", "--stage", "--", *(f"mm_sglang/{name}" for name in LINKED)):
        assert line.startswith("120000 "), line


def test_import_kernels_at_the_root_is_hugging_faces() -> None:
    assert "site-packages" in python("import kernels; print(kernels.__file__)")


@pytest.mark.parametrize(
    ("folder", "foreign", "own"),
    [
        ("kernels", ("sglang", "ray"), ("mm_sglang.kernels",)),
        ("parallel", ("sglang",), ("mm_sglang.kernels", "mm_sglang.parallel")),
    ],
)
def test_imports_point_one_way(folder: str, foreign: tuple[str, ...], own: tuple[str, ...]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ has no modules"
    for path in files:
        for name in imports(path):
            assert not within(name, foreign), f"{path} imports {name}"
            assert not within(name, ("mm_sglang",)) or within(name, own), f"{path} imports {name}"


def test_no_machine_paths_or_registries() -> None:
    found = []
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or b"\0" in (data := path.read_bytes()):
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if match := LEAKS.search(line):
                found.append(f"{name}:{number}: {match[0]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", ["mm_sglang", "mm_sglang.plugin"])
def test_importing_is_light(module: str) -> None:
    """SGLang imports the plugin in every process that it starts, also where nobody asked for mm_sparse."""
    assert python(f"import sys, {module}; print(*({{'torch', 'sglang'}} & set(sys.modules)))") == ""


def test_hooks_say_why() -> None:
    for path in sorted((ROOT / "mm_sglang" / "compat").glob("*.py")):
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            missing = [word for word in ("Why", "How", "Upstream", "Versions") if f"{word}:" not in docstring]
            assert not missing, f"{path}: its docstring lacks {missing}"
