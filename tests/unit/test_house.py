"""The rules for the rooms (folders) of `stack/`: a room imports only rooms above it, and some libraries are imported in
one room only."""

import ast
import tomllib
from fnmatch import fnmatch
from pathlib import Path

STACK = Path(__file__).parents[2] / "stack"
TESTS = Path(__file__).parents[1]
#: The rooms from top to bottom. All rooms may import `errors`, `disk`, `interpreter` and `config`.
ROOMS = [
    "errors",
    "disk",
    "interpreter",
    "config",
    "plan",
    "data",
    "models",
    "parallel",
    "checkpoint",
    "observe",
    "health",
    "train",
    "launch",
    "cli",
]
#: Library -> the rooms or folders that may import it.
ONLY = {"deepspeed": {"parallel"}, "wandb": {"observe/wandb"}, "hydra": {"config"}, "omegaconf": {"config"}}
LONGEST = 400


def _files() -> list[Path]:
    return sorted(STACK.rglob("*.py"))


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def test_a_room_imports_only_rooms_above_it():
    for file in _files():
        here = _room(file.relative_to(STACK).as_posix())
        if here in ("__init__", "__main__"):
            continue
        for name in _imports(file):
            if name.startswith("stack.") and (there := name.split(".")[1]) in ROOMS:
                assert ROOMS.index(there) <= ROOMS.index(here), f"{file.relative_to(STACK)} imports {name}"


def test_each_library_has_one_room():
    for file in _files():
        path = file.relative_to(STACK).as_posix()
        for name in _imports(file):
            allowed = ONLY.get(name.split(".")[0])
            assert allowed is None or {path, _room(path), str(Path(path).parent)} & allowed, f"{path} imports {name}"


def test_only_two_files_touch_deepspeed():
    users = {f.name for f in _files() if any(name.split(".")[0] == "deepspeed" for name in _imports(f))}
    assert users == {"zero.py", "zero_state.py"}


def test_ranks_send_each_other_no_pickles():
    """The object collectives of torch unpickle the bytes that arrive; `parallel/messages.py` sends JSON instead."""
    words = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list")
    assert [f.name for f in _files() for word in words if word in f.read_text()] == []


def test_no_file_has_outgrown_its_room():
    assert {f.name: n for f in _files() if (n := len(f.read_text().splitlines())) > LONGEST} == {}


def test_every_package_is_installed():
    project = tomllib.loads((STACK.parent / "pyproject.toml").read_text())
    folders = {file.parent.relative_to(STACK.parent) for file in _files()}
    named = {".".join(folder.parts) for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == named | {"stack.conf", "hydra_plugins"}


def test_pytest_leaves_out_no_folder_of_tests(pytestconfig):
    """pytest silently skips folders that match `norecursedirs`, unless the command line names them."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {file.parent.name for file in TESTS.rglob("test_*.py")}
    assert {"dist", "unit"} <= folders
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in patterns)] == []
