# SPDX-License-Identifier: MIT
"""What holds for every file of minimal/: it can be copied alone, explains itself, and shared functions do not drift."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "minimal").glob("*.py") if path.name != "__init__.py")
NAMES = [path.stem for path in FILES]
SAME = re.compile(r"# Same as minimal/(\w+)\.py: (\w+)\n(?:@.*\n)*\s*(?:def|class) (\w+)")


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "fused"], ids=lambda path: path.stem)
def test_copied_alone_the_demo_runs(path, tmp_path):
    """In an empty folder, by an interpreter that can find neither the package nor the extension."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(path, folder)
    # -S leaves out site-packages and with it an installed or editable `minimal`; the packages come back one by one.
    packages = tmp_path / "packages"
    packages.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for item in pathlib.Path(place).iterdir():
            if item.suffix not in (".pth", ".egg-link") and not item.name.startswith(("minimal", "__editable__")):
                with_name = packages / item.name
                if not with_name.exists():
                    with_name.symlink_to(item)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MINIMAL_"))} | {"OMP_NUM_THREADS": "2"}
    start = f"import sys; sys.path.insert(1, {str(packages)!r}); sys.path.insert(0, {str(folder)!r})\n"
    check = "import importlib.util as u; assert u.find_spec('minimal') is None, u.find_spec('minimal')\n"
    run = f"import runpy; runpy.run_path({path.name!r}, run_name='__main__')"
    command = [sys.executable, "-S", "-c", start + check + run]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout), f"the demo shows no number:\n{done.stdout}"
    assert [p.name for p in folder.iterdir() if p.name != "__pycache__"] == [path.name], "the demo left files behind"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_form(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= 350, "past 350 lines the idea is two ideas"
    assert 'if __name__ == "__main__":' in text, "no demo"
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert not [n.name for n in public if not ast.get_docstring(n)], "public names without a docstring"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "attention"], ids=lambda path: path.stem)
def test_no_file_imports_a_sibling(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level and (node.module or "").split(".")[0] not in {"minimal", "train", *NAMES}
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"minimal", "train", *NAMES}


def shared():
    for path in FILES:
        for match in SAME.finditer(path.read_text(encoding="utf-8")):
            yield pytest.param(path, *match.groups(), id=f"{path.stem}.{match[3]}")


def definition(path, name):
    found = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if getattr(n, "name", None) == name]
    assert len(found) == 1, f"{path.name} has {len(found)} definitions of {name}"
    if isinstance(found[0].body[0], ast.Expr) and isinstance(found[0].body[0].value, ast.Constant):
        found[0].body = found[0].body[1:]  # the copy may explain itself in fewer words
    return ast.dump(found[0])


@pytest.mark.parametrize("path, origin, name, here", shared())
def test_a_shared_function_is_the_same(path, origin, name, here):
    assert name == here
    assert definition(path, here) == definition(ROOT / "minimal" / f"{origin}.py", name)


def test_the_marks_are_found():
    """The comparison above must not pass because its expression matches nothing."""
    count = sum(path.read_text(encoding="utf-8").count("# Same as minimal/") for path in FILES)
    assert count == len(list(shared())) > 0


def test_tables_and_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"minimal/{name}.py" in readme, f"the README's table leaves out {name}.py"
    for name in re.findall(r"\((minimal/\w+\.py|bench/\w+\.py|csrc/\w+\.\w+)\)", readme):
        assert (ROOT / name).exists(), f"the README names {name}"


def test_the_project_speaks_of_itself_alone():
    """No path of a machine that it was made on."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split() if tracked.returncode == 0 else []
    for name in names:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".h", ".sh", ".json") and path.name != "test_files.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(work|root|tmp/v)/", text), name
