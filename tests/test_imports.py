"""Imports go one way, from the first of `LAYERS` to the last: each may import only what comes before it."""

import ast
import subprocess
import sys
from pathlib import Path

import fp8moe

PACKAGE = Path(__file__).parent.parent / "fp8moe"

LAYERS = (
    {"checks", "config", "devices", "gluon_names", "groups", "groups_kernel", "launch", "operands", "torch_op"},
    {"routing", "routing_kernel", "choices_kernel", "combine", "combine_kernel"},
    {"quantize"},
    {"gemm", "weight_cache"},
    {"autograd"},
    {"modules", "doctor"},
    {"bench", "demo"},
    {"__main__"},
)
SAME_LAYER = {
    *(("groups", other) for other in ("devices", "groups_kernel", "operands", "torch_op")),
    ("groups_kernel", "launch"),
    *(("routing", other) for other in ("routing_kernel", "choices_kernel")),
    ("combine", "combine_kernel"),
}


def layer_of(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def imported(path: Path) -> set[str]:
    """The first-level names within fp8moe that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            targets = [node.module] if node.module != "fp8moe" else [f"fp8moe.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
            continue
        names |= {target.split(".")[1] for target in targets if target.startswith("fp8moe.")}
    return names


def test_imports_go_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    public = {*fp8moe.__all__, "__version__"}
    for path in files:
        if path == PACKAGE / "__init__.py":
            continue
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for target in imported(path):
            if target in public:  # through the front door
                assert layer_of(name) > layer_of("autograd"), f"{path} imports the package's public names"
            elif target != name and (name, target) not in SAME_LAYER:
                assert layer_of(target) < layer_of(name), f"{path.relative_to(PACKAGE.parent)} imports {target}"


def test_kernels_know_nothing_of_autograd_and_autograd_launches_nothing() -> None:
    folders = (PACKAGE / "quantize", PACKAGE / "gemm")
    for path in [*PACKAGE.glob("*_kernel.py"), *(path for folder in folders for path in folder.glob("*.py"))]:
        assert "autograd" not in {part for name in _modules(path) for part in name.split(".")}, path
    for path in (PACKAGE / "autograd").glob("*.py"):
        assert "triton" not in {name.split(".")[0] for name in _modules(path)}, path


def test_importing_the_package_needs_neither_triton_nor_the_extras() -> None:
    program = (
        "import sys\n"
        "for name in ('triton', 'rich', 'matplotlib', 'deep_gemm'): sys.modules[name] = None\n"
        "import torch, fp8moe, fp8moe.__main__\n"
        "out = fp8moe.grouped_mm(torch.ones(3, 128), torch.ones(1, 128, 128), torch.tensor([3], dtype=torch.int32))\n"
        "assert (out == 128).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def _modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return direct | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
